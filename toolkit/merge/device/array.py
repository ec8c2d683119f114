"""An array on a torch device that takes numpy's operators and functions.

So methods, which are written once, in numpy, run on it as they are. What it promises:

- dtypes are numpy's, and so is what two of them give;
- element-wise results are numpy's to the last bit, where IEEE 754 says what they are (`exp` and `log` are torch's);
- sums of all elements of float32 are added in float64 and stay float64; others over the first dimension are added in
  order, as numpy does;
- of 0 and -0, which IEEE 754 calls equal, the larger one may be either, as in numpy;
- views share memory where numpy's do;
- host arrays among the operands, small ones such as a factor per row, are copied to the device; results go back to
  the host only as one number (`float`, `int`, `bool`), by `np.copyto`, and from `np.bincount` and `np.einsum`, whose
  results are statistics;
- whatever else numpy can do is an error that names it; nothing runs on the host instead.

torch has few functions of unsigned numbers, so they are held as signed ones of the same bits, told apart by `dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.lib.mixins import NDArrayOperatorsMixin

from toolkit.errors import UnsupportedError

_STORED = {
    np.dtype(np.bool_): torch.bool,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.uint32): torch.int32,
    np.dtype(np.uint64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}

_WRAPPED = {np.dtype(np.uint32): -(1 << 31), np.dtype(np.uint64): -(1 << 63)}
"""Dtypes that are held as signed numbers -> the sign bit."""

_IN_ORDER = 1024
"""Rows up to which a sum over the first dimension is added one by one."""


def uncovered(what: str) -> UnsupportedError:
    """Return the error for what does not run on a device."""
    return UnsupportedError(f"{what} does not run on a device; merge on the CPU, without --device")


def stored_as(dtype: np.dtype) -> torch.dtype:
    """Return the torch dtype that holds a numpy one.

    Raises:
        UnsupportedError: none does.
    """
    if dtype not in _STORED:
        raise uncovered(f"an array of {dtype}")
    return _STORED[dtype]


class DeviceArray(NDArrayOperatorsMixin):
    """A torch tensor behind numpy's interface.

    Args:
        tensor: the data.
        dtype: which numpy dtype it is; by default the tensor's own.
    """

    def __init__(self, tensor: torch.Tensor, dtype: Any = None) -> None:
        self.tensor = tensor
        self.dtype = np.dtype(str(tensor.dtype).removeprefix("torch.") if dtype is None else dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return tuple(self.tensor.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.tensor.numel()

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.tensor.ndim

    def __len__(self) -> int:
        return len(self.tensor)

    def __iter__(self) -> Iterator[DeviceArray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: Any) -> DeviceArray:
        keys = key if isinstance(key, tuple) else (key,)
        return self._like(self.tensor[tuple(k.tensor if isinstance(k, DeviceArray) else k for k in keys)])

    def __float__(self) -> float:
        return float(cast(self.tensor, self.dtype, np.dtype(np.float64)).item())

    def __int__(self) -> int:
        value = int(self.tensor.item())
        return value if value >= 0 or self.dtype not in _WRAPPED else value + (1 << 8 * self.dtype.itemsize)

    def __bool__(self) -> bool:
        return bool(self.tensor.item())

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to become a host array unasked."""
        raise uncovered("copying an array to the host unasked, as a function of numpy without dispatch does,")

    def __repr__(self) -> str:
        return f"DeviceArray({self.tensor!r}, {self.dtype})"

    def view(self, dtype: Any) -> DeviceArray:
        """Return the same bits as another dtype of the same size."""
        dtype = np.dtype(dtype)
        if dtype.itemsize != self.dtype.itemsize:
            raise uncovered(f"a view of {self.dtype} as {dtype}")
        return DeviceArray(self.tensor.view(stored_as(dtype)), dtype)

    def reshape(self, *shape: Any) -> DeviceArray:
        """Return the elements in another shape, in the same memory where that is possible."""
        return self._like(self.tensor.reshape(*shape))

    def astype(self, dtype: Any) -> DeviceArray:
        """Return a copy as another dtype."""
        dtype = np.dtype(dtype)
        found = cast(self.tensor, self.dtype, dtype)
        return DeviceArray(found.clone() if found is self.tensor else found, dtype)

    def copy(self) -> DeviceArray:
        """Return a copy, contiguous."""
        return self._like(self.tensor.clone(memory_format=torch.contiguous_format))

    def fill(self, value: float) -> None:
        """Set all elements."""
        self.tensor.copy_(operand(value, self.dtype, self.tensor.device))

    def sort(self, axis: int = -1) -> None:
        """Sort in place."""
        self.tensor.copy_(ordered(self, lambda x: torch.sort(x, dim=axis).values))

    def sum(self, axis: int | None = None, dtype: Any = None, keepdims: bool = False) -> DeviceArray:
        """Return sums, of float32 to float64 where they are of all elements."""
        kind = self.dtype.kind
        wide = np.dtype(dtype or {"b": np.int64, "i": np.int64, "u": np.uint64}.get(kind, self.dtype))
        if axis is None:
            wide = np.dtype(np.float64) if kind == "f" else wide
            return DeviceArray(cast(self.tensor, self.dtype, wide).sum(), wide)
        if axis == 0 and kind == "f" and self.ndim > 1 and 0 < len(self) <= _IN_ORDER and not keepdims:
            first, *rest = cast(self.tensor, self.dtype, wide)
            total = first + 0  # as numpy does, for which -0 + -0 is 0 here
            for row in rest:
                total += row
            return DeviceArray(total, wide)
        return DeviceArray(cast(self.tensor, self.dtype, wide).sum(dim=axis, keepdim=keepdims), wide)

    def max(self, axis: int | None = None, keepdims: bool = False) -> DeviceArray:
        """Return the largest elements; NaN where there is one."""
        return self._extreme(torch.amax, axis, keepdims)

    def min(self, axis: int | None = None, keepdims: bool = False) -> DeviceArray:
        """Return the smallest elements; NaN where there is one."""
        return self._extreme(torch.amin, axis, keepdims)

    def any(self) -> DeviceArray:
        """Return whether any element is not 0."""
        return DeviceArray((self.tensor != 0).any())

    def all(self) -> DeviceArray:
        """Return whether no element is 0."""
        return DeviceArray((self.tensor != 0).all())

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """Run one of numpy's element-wise functions."""
        from toolkit.merge.device.functions import call_ufunc

        if method != "__call__":
            raise uncovered(f"np.{ufunc.__name__}.{method}")
        return call_ufunc(ufunc, self.tensor.device, inputs, **options)

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        """Run another of numpy's functions, or make an array `like` this one."""
        from toolkit.merge.device.functions import call_function

        return call_function(function, self.tensor.device, args, kwargs)

    def _like(self, tensor: torch.Tensor) -> DeviceArray:
        return DeviceArray(tensor, self.dtype)

    def _extreme(self, function: Callable[..., torch.Tensor], axis: int | None, keepdims: bool) -> DeviceArray:
        dims = tuple(range(self.ndim)) if axis is None else axis
        return self._like(ordered(self, lambda x: function(x, dim=dims, keepdim=keepdims)))


def cast(tensor: torch.Tensor, old: np.dtype, new: np.dtype) -> torch.Tensor:
    """Return a tensor that holds one numpy dtype as another; the same one where they are equal."""
    if old == new:
        return tensor
    if new in _WRAPPED and old.kind == "f":
        raise uncovered(f"a cast of {old} to {new}")
    widens = new.kind == "f" or new.itemsize > old.itemsize
    if old in _WRAPPED and new.kind != "b" and widens:
        if old.itemsize == 8:
            raise uncovered(f"a cast of {old} to {new}")
        tensor = tensor.to(torch.int64) & 0xFFFFFFFF
    return tensor.to(stored_as(new))


def operand(x: Any, dtype: np.dtype, device: torch.device) -> torch.Tensor:
    """Return a device array, a host array or a number as a tensor of a dtype on a device."""
    if isinstance(x, DeviceArray):
        return cast(x.tensor, x.dtype, dtype)
    held = stored_as(dtype)
    host = np.asarray(x).astype(dtype) if isinstance(x, np.ndarray | np.generic) else np.asarray(x, dtype)
    host = host.view(host.dtype.str.replace("u", "i")) if dtype in _WRAPPED else host
    # A number becomes a tensor on the device: by one on the host, torch divides by multiplying with its inverse.
    if not host.ndim:
        return torch.full((), host.item(), dtype=held, device=device)
    return torch.from_numpy(np.ascontiguousarray(host)).to(device)


def flipped(tensor: torch.Tensor, dtype: np.dtype) -> torch.Tensor:
    """Return numbers that order as signed ones as those of a dtype do; of these, it returns the first."""
    return tensor ^ _WRAPPED[dtype] if dtype in _WRAPPED else tensor


def ordered(x: DeviceArray, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply a function that only compares."""
    return flipped(function(flipped(x.tensor, x.dtype)), x.dtype)


def is_wrapped(dtype: np.dtype) -> bool:
    """Tell whether a dtype is held as signed numbers of the same bits."""
    return dtype in _WRAPPED


@cache
def loop_of(ufunc: np.ufunc, kinds: Sequence[Any], dtype: np.dtype | None, casting: Any) -> tuple[np.dtype, ...]:
    """Return the dtypes that numpy computes an element-wise function in: of its operands, and of its result."""
    if dtype is None:
        return ufunc.resolve_dtypes((*kinds, None), casting=casting)
    return ufunc.resolve_dtypes((*kinds, None), signature=(*[None] * ufunc.nin, dtype), casting=casting)
