"""Text can be read and phases told apart on the page that every picture brings along, with any colour vision."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from splitwiser_lab.lab.dashboard.figure_style import KV_COLOUR, LINE_COLOURS
from splitwiser_lab.lab.palette import DASHES, INK, MODE_COLOURS, OTHER_COLOUR, PAPER, PHASE_COLOURS

# Simulations of missing cones in linear light: Machado, Oliveira and Fernandes, IEEE TVCG 15(6), 2009, severity 1.
MISSING_CONES = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def linear(colour: str) -> np.ndarray:
    """Red, green and blue in linear light, 0 to 1."""
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ (0.2126, 0.7152, 0.0722))


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it: 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def lab(values: np.ndarray) -> np.ndarray:
    """CIELAB of linear light, for a white of D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    scaled = to_xyz @ np.clip(values, 0, 1) / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_text_has_enhanced_contrast():
    assert contrast(INK, PAPER) >= 7


@pytest.mark.parametrize("cones", MISSING_CONES)
def test_phases_are_told_apart_with_any_colour_vision(cones: str):
    seen = {phase: lab(MISSING_CONES[cones] @ linear(colour)) for phase, colour in PHASE_COLOURS.items()}
    for one, other in combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 15, (one, other)  # 2.3 is the least that is noticed


def test_nothing_else_has_the_colour_of_a_phase():
    assert not set(PHASE_COLOURS.values()) & {*MODE_COLOURS, *LINE_COLOURS, OTHER_COLOUR, KV_COLOUR, INK}


def test_each_mode_has_a_colour_and_a_dash_of_its_own():
    assert len(set(MODE_COLOURS)) == len(MODE_COLOURS) == len(set(DASHES)) == len(DASHES) >= 7
