"""The shapes of Azure's 2023 conversation and code traces, as a few figures and draws from them.

Knows no workload: it gives lengths in tokens and gaps over their mean, as plain arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Fitted to the Azure LLM inference traces of 2023 (Azure Public Dataset, CC BY 4.0; Patel et al., Splitwise,
# ISCA 2024): values at these levels of the distribution, the last ones set so that mean and CV are right.
_GAP_LEVELS = (0, 0.05, 0.15, 0.3, 0.5, 0.55, 0.65, 0.75, 0.95, 0.99, 0.995, 0.999, 1)
_GAPS = {  # between arrivals, over their mean
    "conv": (0.002, 0.035, 0.146, 0.336, 0.655, 0.761, 1.01, 1.36, 3.13, 3.86, 4.48, 6.12, 28.6),
    "code": (0.0001, 0.000226, 0.00227, 0.00845, 0.164, 0.23, 0.251, 0.267, 1.03, 4.98, 22.5, 179, 622),
}
RATES = {"conv": 5.5, "code": 2.6}  # requests/s
_LEVELS = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1)
_GROUPS = {  # of requests with like inputs: share, input tokens, output tokens
    "conv": (
        (0.135, (2, 45, 169, 197, 209, 227, 239, 443), (11, 49, 94, 152, 183, 217, 218, 424)),
        (0.253, (302, 375, 387, 398, 407, 420, 429, 514), (7, 62, 81, 93, 106, 129, 144, 270)),
        (0.031, (451, 461, 594, 778, 873, 889, 897, 1052), (10, 51, 79, 96, 122, 395, 413, 438)),
        (0.359, (901, 989, 1025, 1070, 1121, 1176, 1216, 1322), (26, 365, 391, 403, 427, 478, 550, 551)),
        (0.073, (1301, 1313, 1315, 1350, 1559, 1775, 1836, 1837), (24, 57, 86, 138, 185, 231, 302, 634)),
        (0.149, (1901, 2152, 2557, 4075, 4087, 4110, 4181, 6437), (15, 37, 47, 68, 101, 138, 159, 317)),
    ),
    "code": (
        (0.074, (3, 15, 33, 59, 81, 94, 97, 140), (6, 7, 9, 13, 24, 55, 90, 356)),
        (0.871, (101, 258, 750, 1500, 2599, 4075, 5292, 6746), (6, 7, 9, 13, 24, 55, 90, 356)),
        (0.055, (7009, 7358, 7429, 7435, 7436, 7436, 7436, 7437), (6, 7, 9, 13, 24, 55, 90, 356)),
    ),
}


def lengths(trace: str, n: int, random: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Input and output tokens of `n` requests, `[n]` each, drawn by group so that the two belong together."""
    shares = np.cumsum([share for share, _, _ in _GROUPS[trace]])
    group = np.searchsorted(shares[:-1], _even(random, n))
    inputs, outputs = np.zeros(n), np.zeros(n)
    for index, (_, *tokens) in enumerate(_GROUPS[trace]):
        here = group == index
        inputs[here], outputs[here] = (_draw(random, _LEVELS, values, here.sum()) for values in tokens)
    return inputs, outputs


def gaps(trace: str, n: int, random: np.random.Generator) -> NDArray[np.float64]:
    """`n` gaps between arrivals, `[n]`, in multiples of their mean."""
    return _draw(random, _GAP_LEVELS, _GAPS[trace], n)


def _even(random: np.random.Generator, n: int) -> NDArray[np.float64]:
    """`n` stratified draws from [0, 1): one from each n-th part, in random order."""
    return (random.permutation(n) + random.random(n)) / max(n, 1)


def _draw(random: np.random.Generator, levels: Sequence[float], values: Sequence[float], n: int) -> NDArray[np.float64]:
    """`n` stratified draws from a distribution with these values at these levels, log-linear between them."""
    return np.exp(np.interp(_even(random, n), levels, np.log(values)))
