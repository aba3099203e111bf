"""What the pipeline and its worker processes say to each other. Keys and values never travel: they lie in slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from splitwiser_lab.pipelines.kv import KVLayout, Stored
from splitwiser_lab.pipelines.phases import PromptBatch, Step
from splitwiser_lab.pipelines.shared_model import Skeleton
from splitwiser_lab.shared_memory import Handle

Work = Literal["prefill", "decode", "both"]


@dataclass(frozen=True)
class Slots:
    """Shared memory for the keys and values of `count` batches between their two phases."""

    handle: Handle
    count: int
    slot_bytes: int


@dataclass(frozen=True)
class Setup:
    """What a worker must know; sent once. `mps_share` is its percentage of a GPU's SMs; None without MPS, or a GPU."""

    skeleton: Skeleton
    layout: KVLayout
    slots: Slots | None
    device: str
    mps_share: int | None
    cores: list[int]


@dataclass(frozen=True)
class Job:
    """A batch and what to do with it. A decode job names the slot and what prefill left there."""

    batch: PromptBatch
    work: Work
    slot: int = 0
    stored: Stored | None = None
    first: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prefilled:
    """A batch's first tokens; `stored` is what was handed over (None: nothing, or it stays), `written` when."""

    step: Step
    stored: Stored | None = None
    written: tuple[float, float] | None = None


@dataclass(frozen=True)
class Released:
    """The slot of a batch may be written anew."""


@dataclass(frozen=True)
class Done:
    """A job's end, with its decode steps."""

    steps: list[Step]


Report = Prefilled | Released | Done
