"""Matrices in oneDNN's packed layout, in memory that we own and other processes can map.

oneDNN multiplies fastest when a weight lies in blocks of its own choosing; with plain rows it packs
anew at every call. PyTorch can pack a weight once, but only into memory of its own, private to the
process. Here the packed bytes replace the plain ones in the shared buffer: they take the same room,
and every process sees them. Which layout is packed depends on the shape and the machine alone, so a
process that maps the buffer finds it again by packing an empty matrix of the same shape.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from splitwiser_lab.hardware import Choice

_ROWS = 512  # the rows of x to pack for: the layout that oneDNN takes for many is as good for few
_DTYPES = {torch.float32: "aoti_torch_dtype_float32", torch.bfloat16: "aoti_torch_dtype_bfloat16"}


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [rows, in], `weight` [out, in], plain or packed -> [rows, out], by oneDNN."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """silu(`x` @ gate.T) * (`x` @ up.T), both packed [out, in], by oneDNN within the products; `bias` is [2 * out]."""
    biases = (None, None) if bias is None else bias.chunk(2)
    opened = torch.ops.mkldnn._linear_pointwise(x, gate, biases[0], "swish", [], "")
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, opened, up, biases[1], "mul")
    return out


def packable(weight: torch.Tensor) -> bool:
    """Whether this matrix [out, in] can be packed in its place: not where blocks would need padding."""
    return weight.dtype in _DTYPES and _layout(tuple(weight.shape), weight.dtype) is not None


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Overwrite the memory of `weight`, which must be packable, with its packed form; return a view of that."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    ctypes.memmove(weight.data_ptr(), torch.ops.mkldnn.data_ptr(packed), weight.nbytes)
    return view(weight)


def view(memory: torch.Tensor) -> torch.Tensor:
    """What `pack` left in `memory` [out, in], as a tensor that `multiply` takes. `memory` must outlive it."""
    layout = _layout(tuple(memory.shape), memory.dtype)
    assert layout is not None, "only what was packed can be viewed as packed"
    library, handle = _library(), ctypes.c_void_p()
    sizes, strides = ((ctypes.c_int64 * 2)(*numbers) for numbers in (memory.shape, memory.stride()))
    status = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(memory.data_ptr()),
        ctypes.c_int64(2),
        sizes,
        strides,
        ctypes.c_int64(0),
        getattr(library, _DTYPES[memory.dtype])(),
        library.aoti_torch_device_type_cpu(),
        0,
        ctypes.byref(handle),
        library.aoti_torch_layout__mkldnn(),
        layout,
        ctypes.c_int64(len(layout)),
    )
    if status != 0:
        raise RuntimeError(f"PyTorch {torch.__version__} made no tensor over packed memory (status {status})")
    capsule = _new_capsule()(handle, None, None)
    tensor: torch.Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule)
    return tensor


@functools.cache
def packing() -> Choice:
    """`packed` where all of this works on this machine and computes what it should; else the reason why not."""
    if not torch.backends.mkldnn.is_available():
        return Choice("plain", "this PyTorch has no oneDNN")
    generator = torch.Generator().manual_seed(0)
    x, plain = (torch.rand(rows, 64, generator=generator) for rows in (3, 128))
    try:
        wanted, copy = x @ plain.t(), plain.clone()
        if not torch.allclose(multiply(x, plain), wanted, rtol=1e-5, atol=1e-5):
            return Choice("plain", "oneDNN's linear kernel computed something else than PyTorch's")
        if not packable(copy):
            return Choice("onednn", "oneDNN packs matrices into another size here: they stay plain")
        packed = pack(copy)
        both = torch.nn.functional.silu(wanted) * wanted
        if not torch.allclose(multiply(x, packed), wanted, rtol=1e-5, atol=1e-5) or not torch.allclose(
            gated(x, packed, packed), both, rtol=1e-5, atol=1e-5
        ):
            return Choice("onednn", "packed weights computed something else than plain ones: they stay plain")
    except (AttributeError, RuntimeError, TypeError, OSError) as error:
        return Choice("plain", f"oneDNN's kernel cannot be reached in PyTorch {torch.__version__}: {error}")
    return Choice("packed", "oneDNN reads weights packed once, in shared memory")


@functools.cache
def _layout(shape: tuple[int, int], dtype: torch.dtype) -> bytes | None:
    """oneDNN's description of a packed matrix of this shape; None if it takes more room than the plain one."""
    empty = torch.zeros(shape, dtype=dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(empty, _ROWS)
    if torch.ops.mkldnn._nbytes(packed) != empty.nbytes:
        return None
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())


@functools.cache
def _library() -> ctypes.CDLL:
    """PyTorch's stable C interface, which can make a tensor over given memory in a given layout."""
    folder = Path(torch.__file__).parent / "lib"
    return ctypes.CDLL(str(next(folder.glob("libtorch_cpu.*"))))


@functools.cache
def _new_capsule() -> ctypes._FuncPointer:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new
