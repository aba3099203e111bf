"""What this machine is, what it can do, and why it cannot do the rest.

Every automatic choice made here comes with a reason that a person can read.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from splitwiser_lab.errors import HardwareError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


class Choice(NamedTuple):
    """A value chosen automatically, and why."""

    value: str
    reason: str


class ModeSupport(NamedTuple):
    """Whether a mode runs on a device; if not, `reason` says why and what would make it run."""

    mode: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Hardware:
    """The facts that every measurement carries."""

    device: str
    device_name: str
    cpu: str
    cores: int
    memory_bytes: int
    capability: tuple[int, int] | None
    python: str
    torch: str
    transformers: str
    system: str

    def to_dict(self) -> dict[str, object]:
        """Plain values under plain names, for JSON."""
        return {**self.__dict__, "capability": list(self.capability) if self.capability else None}


def cores() -> list[int]:
    """Numbers of the CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def choose_device(device: str = "auto") -> Choice:
    """`cuda` where PyTorch sees a GPU, else `cpu`. Raises HardwareError for a device that is not there."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return Choice("cuda", f"PyTorch sees {torch.cuda.get_device_name(0)}")
        built = "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch finds no NVIDIA GPU"
        return Choice("cpu", built)
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise HardwareError(f"device {device!r} is not supported: use 'auto', 'cpu' or 'cuda'.")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (torch.device(device).index or 0) >= count:
            seen = f"it sees {count} GPU(s)" if torch.version.cuda else "this PyTorch is a CPU build"
            raise HardwareError(f"device {device!r} is not there: {seen}. Use device='cpu' or 'auto'.")
    return Choice(device, "asked for")


def choose_dtype(device: str, dtype: str | torch.dtype = "auto") -> Choice:
    """float32 on a CPU; bfloat16 on a GPU that computes in it (sm_80 and newer), else float16."""
    import torch

    name = str(dtype).removeprefix("torch.")
    if name != "auto":
        if name not in DTYPES:
            raise HardwareError(f"dtype {name!r} is not supported: use 'auto' or one of {', '.join(DTYPES)}.")
        return Choice(name, "asked for")
    if torch.device(device).type == "cpu":
        return Choice("float32", "on a CPU float32 makes every mode's tokens exactly those of transformers")
    major, minor = torch.cuda.get_device_capability(device)
    # is_bf16_supported() is True on older GPUs as well, where bfloat16 is only emulated.
    if (major, minor) >= (8, 0):
        return Choice("bfloat16", f"sm_{major}{minor} computes in bfloat16")
    return Choice("float16", f"sm_{major}{minor} has no bfloat16 units (sm_80 and newer have)")


def free_memory_bytes(device: str) -> int:
    """Memory that a new allocation could take on `device`."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def describe(device: str = "auto") -> Hardware:
    """Names, sizes and versions of what is here."""
    import importlib.metadata

    import psutil
    import torch

    where = choose_device(device).value
    gpu = torch.device(where).type == "cuda"
    cpu = _cpu_name()
    return Hardware(
        device=where,
        device_name=torch.cuda.get_device_name(where) if gpu else cpu,
        cpu=cpu,
        cores=len(cores()),
        memory_bytes=torch.cuda.mem_get_info(where)[1] if gpu else psutil.virtual_memory().total,
        capability=torch.cuda.get_device_capability(where) if gpu else None,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=importlib.metadata.version("transformers"),
        system=f"{platform.system()} {platform.machine()}",
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
