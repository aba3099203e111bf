"""Which shares of a GPU's SMs multiply right under MPS: each is tried by a client of its own.

A share counts for a whole process, from the moment at which CUDA starts there, so there must be one for each.
`python -m splitwiser_lab.lanes.share_check DEVICE` is such a client; it says what it found as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from splitwiser_lab.lanes.child import environment
from splitwiser_lab.lanes.mps import MpsDaemon, MpsShare

DTYPES = ("bfloat16", "float16", "float32")
# [out, in] of models of 0.1 to 8 billion parameters: attention, gates, and what follows each
WIDTHS = ((576, 1536), (768, 768), (3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (6144, 4096), (4096, 14336))
_AT_ONCE = 4  # clients: some seconds each, most of which they spend importing
_SECONDS = 120.0


@dataclass(frozen=True)
class ShareCheck:
    """What a client with `percent` of the SMs found: how many products of each dtype it tried, how many were wrong.

    `sms` are those that CUDA says it has, 0 on a CPU; `error` says why it found nothing.
    """

    percent: int
    sms: int = 0
    tried: int = 0
    wrong: dict[str, int] | None = None
    error: str = ""

    @property
    def right(self) -> bool:
        """Whether every product was right."""
        return self.wrong is not None and not any(self.wrong.values())

    def __str__(self) -> str:
        """`right (192 products)`, `WRONG: 54 of 64 in bfloat16`, or why it is not known."""
        if self.wrong is None:
            return f"not known: {self.error}"
        if self.right:
            return f"right ({self.tried * len(self.wrong)} products)"
        return "WRONG: " + ", ".join(f"{n} of {self.tried} in {dtype}" for dtype, n in self.wrong.items() if n)


def check_shares(daemon: MpsDaemon, percents: Sequence[int], device: str = "cuda") -> Iterator[ShareCheck]:
    """Try each share, some at a time, in the order given. Raises LaneError when the daemon does not start."""
    waiting, running = list(percents), list[tuple[int, MpsShare, subprocess.Popen[str]]]()
    try:
        while waiting or running:
            while waiting and len(running) < _AT_ONCE:
                percent, share = waiting[0], MpsShare(daemon, waiting.pop(0))
                running.append((percent, share, _client(share, device)))
            percent, share, client = running[0]
            yield _answer(percent, client)
            share.leave()
            del running[0]
    finally:
        for _, share, client in running:
            client.kill()
            client.wait()
            share.leave()


def _client(share: MpsShare, device: str) -> subprocess.Popen[str]:
    around = share.enter()
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "splitwiser_lab.lanes.share_check", device],
            env=environment(around),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
    except BaseException:
        share.leave()
        raise


def _answer(percent: int, client: subprocess.Popen[str]) -> ShareCheck:
    try:
        said, complaint = client.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        client.kill()
        client.communicate()
        return ShareCheck(percent, error=f"no answer within {_SECONDS:.0f} s")
    if client.returncode != 0:
        return ShareCheck(percent, error=(complaint.strip().splitlines() or ["it ended without a word"])[-1])
    return ShareCheck(percent, **json.loads(said.splitlines()[-1]))


def main(device: str) -> None:
    """Multiply on `device`, in each dtype, and print what came of it."""
    import torch

    from splitwiser_lab.cuda_driver import mps_enabled
    from splitwiser_lab.model.products import wrong_products

    on_cpu = device == "cpu"  # which has no shares: there, enough to see that clients start and answer
    if not on_cpu and not mps_enabled(0):
        raise SystemExit("CUDA started without the MPS daemon")
    sms = 0 if on_cpu else torch.cuda.get_device_properties(0).multi_processor_count
    wrong = {}
    for dtype in DTYPES[-1:] if on_cpu else DTYPES:
        shapes = WIDTHS[:1] if on_cpu else WIDTHS
        matrices = [(torch.randn(shape, device=device) * 0.02).to(getattr(torch, dtype)) for shape in shapes]
        tried, found = wrong_products(matrices)
        wrong[dtype] = len(found)
    answer = asdict(ShareCheck(0, sms, len(tried), wrong))
    del answer["percent"]
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
