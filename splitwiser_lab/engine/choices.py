"""What mode `auto` chooses among on a device, what to expect of each choice, and what is left out and why."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from splitwiser_lab.engine.controller import Candidate, Shares
from splitwiser_lab.engine.modes import MODES, find_mode
from splitwiser_lab.errors import ModeError
from splitwiser_lab.hardware import cores
from splitwiser_lab.lanes.support import LaneKind

TURNS = Candidate("sequential", "turns")
_SPLITS = (0.25, 0.375, 0.5)  # parts of the SMs for decode that are worth trying
_CHUNKS = (0.5, 1, 1.5, 2, 4)  # times the usual tokens of a mixed batch
# About what an H200 left of both phases (2048 tokens beside 32 requests at 1024, models of 1B and 8B, the gain map in
# data/recordings/h200); measuring replaces it.
_PRIORS = {
    "streams": Candidate("streams", "split", {}, Shares(0.80, 0.25), divides=False),
    "mps": Candidate("mps", "split", {}, Shares(0.78, 0.28)),
    "processes": Candidate("processes", "split", {}, Shares(0.55, 0.41), divides=False),
}


def partition_prior(part: float) -> Shares:
    """The same of two green contexts, where decode has `part` of the SMs: it needs fewer of them than prefill does."""
    return Shares(0.87 * (1 - part), min(0.95, 0.95 * part**0.5))


def candidates(
    device: str, chunk_tokens: int, running: Collection[LaneKind] = (), with_processes: bool = False
) -> tuple[list[Candidate], dict[str, str]]:
    """What `auto` chooses among on `device`, turns first, and what is left out and why.

    On a GPU, lanes in other processes are choices where some already run (`running`) or `with_processes` allows
    them: each holds some hundred MB. `chunk_tokens` are the usual tokens of a mixed batch.
    """
    chunks = [max(1, round(chunk_tokens * times)) for times in _CHUNKS]
    found = [TURNS, *(Candidate("chunked", "mixed", {"chunk_tokens": tokens}) for tokens in chunks)]
    left_out: dict[str, str] = {}

    def available(mode: str) -> bool:
        try:
            find_mode(mode, device)
        except ModeError as error:
            left_out[mode] = str(error).rstrip(".")
        return mode not in left_out

    if torch.device(device).type == "cpu":
        count = len(cores())
        if count < 2:
            left_out["processes"] = "there is one core, which two phases cannot share"
        elif available("processes"):
            part = max(1, count // 2) / count
            found.append(Candidate("processes", "split", {}, Shares(1 - part, min(0.95, 1.8 * part))))
        return found, left_out
    if available("partitioned"):
        for sms, part in splits(device, _SPLITS):
            found.append(Candidate("partitioned", "split", {"decode_sms": sms}, partition_prior(part)))
    for mode, candidate in _PRIORS.items():
        kinds = {kind for kind, _ in MODES[mode].lanes.values()}
        own_process = kinds & {"process", "mps"}
        if own_process and not with_processes and not kinds <= set(running):
            left_out[mode] = (
                "its lanes are other processes, which hold some hundred MB of the GPU each: run that mode once before, "
                "or give the option with_processes=1"
            )
        elif available(mode):
            found.append(candidate)
    return found, left_out


def splits(device: str, parts: Sequence[float]) -> list[tuple[int, float]]:
    """The possible numbers of SMs for decode nearest to these parts of all, and which part each really is."""
    from splitwiser_lab.lanes.partition import grid_of
    from splitwiser_lab.lanes.support import index_of

    grid = grid_of(index_of(torch.device(device)))
    allowed = grid.allowed
    sms = {min(allowed, key=lambda n: abs(n - part * grid.total)) for part in parts}
    return [(n, n / grid.total) for n in sorted(sms)]
