"""numpy's functions on device arrays: those that merge methods use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from toolkit.merge.device.array import (
    DeviceArray,
    cast,
    flipped,
    is_wrapped,
    loop_of,
    operand,
    stored_as,
    uncovered,
)

Tensors = Callable[..., torch.Tensor]

_WITH_OUT: Mapping[np.ufunc, Tensors] = {
    np.add: torch.add,
    np.subtract: torch.sub,
    np.multiply: torch.mul,
    np.divide: torch.div,
    np.maximum: torch.maximum,
    np.minimum: torch.minimum,
    np.absolute: torch.abs,
    np.negative: torch.neg,
    np.exp: torch.exp,
    np.log: torch.log,
    np.bitwise_and: torch.bitwise_and,
    np.bitwise_or: torch.bitwise_or,
    np.bitwise_xor: torch.bitwise_xor,
    np.invert: torch.bitwise_not,
    np.left_shift: torch.bitwise_left_shift,
    np.right_shift: torch.bitwise_right_shift,
    np.logical_and: torch.logical_and,
    np.logical_or: torch.logical_or,
    np.logical_not: torch.logical_not,
    np.equal: torch.eq,
    np.not_equal: torch.ne,
    np.less: torch.lt,
    np.less_equal: torch.le,
    np.greater: torch.gt,
    np.greater_equal: torch.ge,
    np.matmul: torch.matmul,
}
"""Functions that can write where they are told to."""

_WITHOUT: Mapping[np.ufunc, Tensors] = {
    np.sign: lambda x: torch.where(torch.isnan(x), x, torch.sign(x)) if x.is_floating_point() else torch.sign(x),
    np.square: torch.square,
    np.isnan: torch.isnan,
    np.isfinite: torch.isfinite,
    np.vecdot: lambda a, b: (a * b).sum(-1),
}

_ON_BITS = {
    *(np.add, np.subtract, np.multiply, np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.invert, np.left_shift),
    *(np.equal, np.not_equal, np.logical_and, np.logical_or, np.logical_not),
}
"""Functions that give the same bits for unsigned numbers as for signed ones."""

_COMPARING = {np.less, np.less_equal, np.greater, np.greater_equal, np.maximum, np.minimum}


def call_ufunc(
    ufunc: np.ufunc,
    device: torch.device,
    inputs: Sequence[Any],
    *,
    out: tuple[Any, ...] = (None,),
    dtype: Any = None,
    casting: str = "same_kind",
    **options: Any,
) -> DeviceArray:
    """Run an element-wise function as numpy would, with the same dtypes."""
    if options or (ufunc not in _WITH_OUT and ufunc not in _WITHOUT):
        raise uncovered(f"np.{ufunc.__name__}{''.join(f' with {key}=' for key in options)}")
    wanted = None if dtype is None else np.dtype(dtype)
    *taken, given = loop_of(ufunc, tuple(_kind(x) for x in inputs), wanted, casting)
    operands = [operand(x, d, device) for x, d in zip(inputs, taken, strict=True)]
    (into,) = out
    if into is None:
        return DeviceArray(_compute(ufunc, operands, taken[0]), given)
    if not isinstance(into, DeviceArray):
        raise uncovered(f"np.{ufunc.__name__} into an array of the host")
    if not np.can_cast(given, into.dtype, casting):  # pyright: ignore[reportArgumentType]  # one of numpy's words
        raise TypeError(f"np.{ufunc.__name__} gives {given}, which cannot be written as {into.dtype}")
    if into.dtype == given and ufunc in _WITH_OUT and not is_wrapped(taken[0]):
        _check_shape(into, operands)
        _WITH_OUT[ufunc](*operands, out=into.tensor)
        return into
    found = _compute(ufunc, operands, taken[0])
    _check_shape(into, [found])
    into.tensor.copy_(cast(found, given, into.dtype))
    return into


def _compute(ufunc: np.ufunc, operands: Sequence[torch.Tensor], dtype: np.dtype) -> torch.Tensor:
    function = _WITH_OUT[ufunc] if ufunc in _WITH_OUT else _WITHOUT[ufunc]
    if not is_wrapped(dtype) or ufunc in _ON_BITS:
        return function(*operands)
    if ufunc in _COMPARING:
        found = function(*(flipped(x, dtype) for x in operands))
        return flipped(found, dtype) if found.dtype != torch.bool else found
    if ufunc is np.right_shift:
        x, by = operands
        ones = torch.full_like(by, -1)
        # What comes in from the left is the sign; a mask of the bits that are left clears it, by 0 all of them.
        kept = torch.where(by == 0, ones, ~(ones << (8 * dtype.itemsize - by)))
        return (x >> by) & kept
    raise uncovered(f"np.{ufunc.__name__} of {dtype}")


def _check_shape(into: DeviceArray, operands: Sequence[torch.Tensor]) -> None:
    # torch would make the output fit.
    shape = torch.broadcast_shapes(*(x.shape for x in operands))
    if into.tensor.shape != shape:
        raise ValueError(f"a result of shape {tuple(shape)} does not fit an output of shape {into.shape}")


def _kind(x: Any) -> Any:
    """Return what decides on dtypes: that of an array, or the type of a plain number."""
    return x.dtype if isinstance(x, DeviceArray | np.ndarray | np.generic) else type(x)


def call_function(function: Callable[..., Any], device: torch.device, args: Any, kwargs: Any) -> Any:
    """Run a function that is not element-wise."""
    if function in _MAKING:
        return _MAKING[function](device, *args, **kwargs)
    if function not in _FUNCTIONS:
        raise uncovered(f"np.{function.__name__}")
    return _FUNCTIONS[function](*args, **kwargs)


def _empty(device: torch.device, shape: int | tuple[int, ...], dtype: Any = np.float64) -> DeviceArray:
    return DeviceArray(torch.empty(shape, dtype=stored_as(np.dtype(dtype)), device=device), dtype)


def _zeros(device: torch.device, shape: int | tuple[int, ...], dtype: Any = np.float64) -> DeviceArray:
    return DeviceArray(torch.zeros(shape, dtype=stored_as(np.dtype(dtype)), device=device), dtype)


def _full(on: torch.device, shape: int | tuple[int, ...], value: Any, dtype: Any, **layout: Any) -> DeviceArray:
    found = _empty(on, shape, dtype)
    found.fill(value)
    return found


def _arange(device: torch.device, stop: int, dtype: Any = np.int64) -> DeviceArray:
    return DeviceArray(torch.arange(stop, dtype=stored_as(np.dtype(dtype)), device=device), dtype)


_MAKING: Mapping[Any, Callable[..., DeviceArray]] = {
    np.empty: _empty,
    np.zeros: _zeros,
    np.full: _full,
    np.arange: _arange,
    np.ascontiguousarray: lambda device, x: DeviceArray(x.tensor.contiguous(), x.dtype),
}
"""Functions that make an array `like` another one."""


def _copyto(into: Any, x: Any, casting: str = "same_kind", where: Any = True) -> None:
    """Copy to a device array, or from one to the host, which is how results get there."""
    if not isinstance(into, DeviceArray):
        if where is not True:
            raise uncovered("np.copyto to the host with where=")
        return np.copyto(into, to_host(x), casting=casting)  # pyright: ignore[reportCallIssue, reportArgumentType]
    source = x if isinstance(x, int | float) else np.dtype(x.dtype)
    if not isinstance(source, int | float) and not np.can_cast(source, into.dtype, casting):  # pyright: ignore
        raise TypeError(f"np.copyto of {source} to {into.dtype}")
    value = operand(x, into.dtype, into.tensor.device)
    if where is not True:
        value = torch.where(operand(where, np.dtype(np.bool_), into.tensor.device), value, into.tensor)
    into.tensor.copy_(value)


def to_host(x: DeviceArray) -> np.ndarray:
    """Return a copy on the host."""
    return x.tensor.cpu().numpy().view(x.dtype)


def _concatenate(arrays: Sequence[DeviceArray], axis: int = 0) -> DeviceArray:
    (dtype,) = {x.dtype for x in arrays}
    return DeviceArray(torch.cat([x.tensor for x in arrays], dim=axis), dtype)


def _sort(x: DeviceArray, axis: int = -1) -> DeviceArray:
    found = x.copy()
    found.sort(axis)
    return found


def _bincount(x: DeviceArray, minlength: int = 0) -> np.ndarray:
    return torch.bincount(cast(x.tensor, x.dtype, np.dtype(np.int64)), minlength=minlength).cpu().numpy()


def _clip(x: DeviceArray, low: float, high: float, out: DeviceArray | None = None) -> DeviceArray:
    if x.dtype.kind != "f":
        raise uncovered(f"np.clip of {x.dtype}")
    found = DeviceArray(torch.clamp(x.tensor, low, high), x.dtype)
    if out is None:
        return found
    _copyto(out, found)
    return out


def _where(condition: DeviceArray, x: Any, y: Any) -> DeviceArray:
    dtype = np.result_type(*(v if isinstance(v, int | float) else v.dtype for v in (x, y)))
    device = condition.tensor.device
    chosen = torch.where(condition.tensor, operand(x, dtype, device), operand(y, dtype, device))
    return DeviceArray(chosen, dtype)


def _take(x: DeviceArray, indices: DeviceArray, out: DeviceArray | None = None, mode: str = "raise") -> DeviceArray:
    """Take elements of a flattened array; places beyond its ends are its ends."""
    if mode != "clip":
        raise uncovered(f"np.take with mode={mode!r}")
    found = DeviceArray(x.tensor.reshape(-1)[indices.tensor.clamp(0, x.size - 1)], x.dtype)
    if out is None:
        return found
    _copyto(out, found)
    return out


def _searchsorted(x: DeviceArray, values: DeviceArray, side: Any = "left") -> DeviceArray:
    """Find places in a sorted array, both of one dtype."""
    if x.dtype != values.dtype:
        raise uncovered(f"np.searchsorted of {values.dtype} in {x.dtype}")
    inside, sought = flipped(x.tensor, x.dtype), flipped(values.tensor, x.dtype).contiguous()
    return DeviceArray(torch.searchsorted(inside, sought, side=side))


def _bits(device: torch.device) -> torch.Tensor:
    return torch.arange(7, -1, -1, device=device, dtype=torch.uint8)


def _packbits(x: DeviceArray) -> DeviceArray:
    padded = torch.nn.functional.pad(x.tensor.reshape(-1).to(torch.uint8), (0, -x.size % 8))
    shifted = padded.reshape(-1, 8) << _bits(padded.device)
    return DeviceArray(shifted.sum(1, dtype=torch.uint8))


def _unpackbits(x: DeviceArray, count: int) -> DeviceArray:
    bits = (x.tensor[:, None] >> _bits(x.tensor.device)) & 1
    return DeviceArray(bits.reshape(-1)[:count])


def _einsum(subscripts: str, *arrays: DeviceArray) -> np.ndarray:
    return torch.einsum(subscripts, *(x.tensor for x in arrays)).cpu().numpy()


_FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    np.empty_like: lambda x, dtype=None: _empty(x.tensor.device, x.shape, dtype or x.dtype),
    np.zeros_like: lambda x, dtype=None: _zeros(x.tensor.device, x.shape, dtype or x.dtype),
    np.copyto: _copyto,
    np.concatenate: _concatenate,
    np.sort: _sort,
    # More than was asked for, and in the order that was.
    np.partition: lambda x, place: _sort(x),
    np.flatnonzero: lambda x: DeviceArray(torch.nonzero(x.tensor.reshape(-1)).reshape(-1)),
    np.count_nonzero: lambda x: int(torch.count_nonzero(x.tensor)),
    np.bincount: _bincount,
    np.clip: _clip,
    np.where: _where,
    np.take: _take,
    np.searchsorted: _searchsorted,
    np.packbits: _packbits,
    np.unpackbits: _unpackbits,
    np.einsum: _einsum,
}
"""All others that are covered."""
