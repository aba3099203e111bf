"""A transformers model whose weights lie once in shared memory, and that any process can put together again.

The model is pickled without its tensors: what is left is its modules as they are, a few kilobytes. Each
tensor, parameter or buffer, is a place in one shared buffer. So any model works, whatever its class.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from splitwiser_lab.errors import ModelError
from splitwiser_lab.shared_memory import Buffer, Handle, allocate, attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALIGNMENT = 64  # bytes

_Place = tuple[int, tuple[int, ...], torch.dtype, bool]  # offset in bytes, shape, dtype, is it a parameter?


@dataclass(frozen=True)
class Skeleton:
    """All of a model but its tensors, to send to another process once."""

    pickled: bytes
    handle: Handle
    nbytes: int

    def fill(self, device: str) -> PreTrainedModel:
        """The model, in eval mode, over the shared weights. Raises HardwareError when they cannot be mapped."""
        return _put_together(self.pickled, attach(self.handle, self.nbytes, device))


class SharedModel:
    """Weights of a model, copied to shared memory once; the model that was given is not touched."""

    def __init__(self, model: PreTrainedModel, device: str) -> None:
        """Raises ModelError for a model that cannot be pickled, HardwareError when there is no room."""
        pickler = _Pickler()
        try:
            self._pickled = pickler.pickled(model)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{type(model).__name__} cannot be sent to another process: {error}. Define its class in a module "
                "that can be imported, and give it no lambdas or open files."
            ) from error
        self.nbytes = max(pickler.nbytes, 1)
        self._buffer: Buffer = allocate(self.nbytes, device)
        with torch.no_grad():
            for tensor, place in pickler.tensors:
                _tensor(self._buffer, place).copy_(tensor)

    def skeleton(self) -> Skeleton:
        """What another process needs. Raises HardwareError where a GPU's memory cannot be shared."""
        return Skeleton(self._pickled, self._buffer.export(), self.nbytes)

    @property
    def inherited(self) -> list[int]:
        """The file descriptor that a child must inherit, if the weights are behind one."""
        handle = self._buffer.export()
        return [handle] if isinstance(handle, int) else []

    def here(self) -> PreTrainedModel:
        """The model over the same weights in this process: no second copy of them."""
        return _put_together(self._pickled, self._buffer)


class _Pickler(pickle.Pickler):
    """Takes each tensor out of what it pickles and gives it a place; one that occurs twice gets one place."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file, pickle.HIGHEST_PROTOCOL)
        self.nbytes = 0
        self.tensors: list[tuple[torch.Tensor, _Place]] = []
        self._places: dict[tuple[Any, ...], int] = {}

    def pickled(self, model: PreTrainedModel) -> bytes:
        self.dump(model)
        return pickle.dumps(([place for _, place in self.tensors], self._file.getvalue()))

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        key = (obj.data_ptr(), obj.shape, obj.stride(), obj.dtype, obj.device, isinstance(obj, torch.nn.Parameter))
        if obj.numel() == 0 or key not in self._places:
            self._places[key] = len(self.tensors)
            place = (self.nbytes, tuple(obj.shape), obj.dtype, isinstance(obj, torch.nn.Parameter))
            self.tensors.append((obj, place))
            self.nbytes += -(-obj.numel() * obj.element_size() // _ALIGNMENT) * _ALIGNMENT
        return self._places[key]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self._tensors[pid]


def _put_together(pickled: bytes, buffer: Buffer) -> PreTrainedModel:
    places, rest = pickle.loads(pickled)  # made by this program, for itself
    model = _Unpickler(io.BytesIO(rest), [_tensor(buffer, place) for place in places]).load()
    return model.eval()  # type: ignore[no-any-return]


def _tensor(buffer: Buffer, place: _Place) -> torch.Tensor:
    offset, shape, dtype, parameter = place
    tensor = buffer.tensor(dtype, shape, offset) if math.prod(shape) else torch.empty(shape, dtype=dtype)
    return torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor
