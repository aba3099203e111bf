"""Two disjoint parts of a GPU: green contexts, one for decode and one for what is left.

One split gives both parts. Two contexts made one after the other, each by its own split of the whole
device (as PyTorch's own GreenContext does before 2.14), would share the same SMs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from splitwiser_lab.cuda_driver import call, current, driver
from splitwiser_lab.errors import HardwareError, ModeError

# Smallest part and step by compute capability, for drivers that do not tell; the CUDA driver API
# reference has the table under cuDevSmResourceSplitByCount.
_STEPS = {7: (2, 2), 8: (4, 2)}
_NEWER = (8, 8)


@dataclass(frozen=True)
class SmGrid:
    """How the `total` SMs of a GPU can be divided: no part under `smallest`, decode's a multiple of `step`."""

    total: int
    smallest: int
    step: int

    @property
    def allowed(self) -> range:
        """The numbers of SMs that decode can have. Empty where the GPU is too small to divide."""
        first = -(-self.smallest // self.step) * self.step
        return range(first, self.total - self.smallest + 1, self.step)

    def decode_sms(self, asked: int | None = None) -> int:
        """`asked` if it is possible, for None the possible number nearest to half, the lower of two.

        Raises ModeError with the possible numbers.
        """
        if not self.allowed:
            raise ModeError(f"{self.total} SMs are too few for two parts of at least {self.smallest}.")
        if asked is None:
            return min(self.allowed, key=lambda sms: abs(2 * sms - self.total))
        if asked not in self.allowed:
            raise ModeError(
                f"decode_sms={asked} is not possible on this GPU with {self.total} SMs: give a multiple of "
                f"{self.step} from {self.allowed[0]} to {self.allowed[-1]}; prefill gets the rest."
            )
        return asked


@functools.cache
def grid_of(device: int) -> SmGrid:
    """How GPU number `device` can be divided. Raises HardwareError where the driver knows no green contexts."""
    with current(device) as handle:
        sm = _sm_resource(handle).sm
    smallest, step = _STEPS.get(torch.cuda.get_device_capability(device)[0], _NEWER)
    told = getattr(sm, "minSmPartitionSize", 0), getattr(sm, "smCoscheduledAlignment", 0)  # since CUDA 13
    return SmGrid(sm.smCount, told[0] or smallest, told[1] or step)


class Partition:
    """Two green contexts with disjoint SMs and one stream on each: `decode` and `prefill`."""

    def __init__(self, device: int, decode_sms: int) -> None:
        """Divide GPU number `device`. Raises HardwareError where it cannot be divided so."""
        with current(device) as handle:
            (first, *_), _, rest = call("cuDevSmResourceSplitByCount", 1, _sm_resource(handle), 0, decode_sms)
            self.decode = _stream_on(handle, first, device, priority=-1)
            self.prefill = _stream_on(handle, rest, device, priority=0)
        total = grid_of(device).total
        if first.sm.smCount != decode_sms or first.sm.smCount + rest.sm.smCount > total:
            raise HardwareError(
                f"the driver divided {total} SMs into {first.sm.smCount} and {rest.sm.smCount}, "
                f"where {decode_sms} and the rest were asked for: the parts would not be disjoint."
            )
        self.decode_sms, self.prefill_sms = int(first.sm.smCount), int(rest.sm.smCount)


def _sm_resource(handle: Any) -> Any:
    return call("cuDeviceGetDevResource", handle, driver().CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)


def _stream_on(handle: Any, resource: Any, device: int, priority: int) -> torch.cuda.Stream:
    module = driver()
    description = call("cuDevResourceGenerateDesc", [resource], 1)
    flags = module.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = call("cuGreenCtxCreate", description, handle, flags)
    stream = call("cuGreenCtxStreamCreate", context, module.CUstream_flags.CU_STREAM_NON_BLOCKING, priority)
    given = call("cuGreenCtxGetDevResource", context, module.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    if given.sm.smCount != resource.sm.smCount:
        raise HardwareError(f"a green context got {given.sm.smCount} SMs, not {resource.sm.smCount}.")
    return torch.cuda.ExternalStream(int(stream), device=device)
