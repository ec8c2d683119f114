"""The number formats of safetensors: their sizes, and their conversion to float32 and back.

Everything here is numpy: reading and merging weights on a CPU must not pay for importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import UnsupportedError

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class DType:
    """A storage format.

    Attributes:
        name: as safetensors headers spell it.
        bits: per element; formats below 8 bits are packed.
        torch: name in torch, or an empty string where torch has none.
        floating: whether `decode` and `encode` can convert it.
    """

    name: str
    bits: int
    torch: str
    floating: bool = False

    def nbytes(self, count: int) -> int:
        """Return the bytes that `count` elements take."""
        return (count * self.bits + 7) // 8


DTYPES = {
    d.name: d
    for d in (
        DType("F64", 64, "float64", True),
        DType("F32", 32, "float32", True),
        DType("F16", 16, "float16", True),
        DType("BF16", 16, "bfloat16", True),
        DType("F8_E4M3", 8, "float8_e4m3fn", True),
        DType("F8_E5M2", 8, "float8_e5m2", True),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", True),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", True),
        DType("F8_E8M0", 8, "float8_e8m0fnu"),
        DType("F6_E2M3", 6, ""),
        DType("F6_E3M2", 6, ""),
        DType("F4", 4, "float4_e2m1fn_x2"),
        DType("C64", 64, "complex64"),
        DType("I64", 64, "int64"),
        DType("I32", 32, "int32"),
        DType("I16", 16, "int16"),
        DType("I8", 8, "int8"),
        DType("U64", 64, "uint64"),
        DType("U32", 32, "uint32"),
        DType("U16", 16, "uint16"),
        DType("U8", 8, "uint8"),
        DType("BOOL", 8, "bool"),
    )
}

_BY_TORCH = {d.torch: d for d in DTYPES.values() if d.torch}
_SHORT = {"bf16": "BF16", "fp16": "F16", "half": "F16", "fp32": "F32", "float": "F32", "fp64": "F64"}


def by_torch_name(name: str) -> DType:
    """Return the format that torch, configs and merge specs call `name`, such as `"bfloat16"`.

    Raises:
        UnsupportedError: no such format.
    """
    short = name.removeprefix("torch.")
    if short in _SHORT:
        return DTYPES[_SHORT[short]]
    if short not in _BY_TORCH:
        known = ", ".join(sorted(d.torch for d in DTYPES.values() if d.floating))
        raise UnsupportedError(f"unknown dtype {name!r} (known: {known})")
    return _BY_TORCH[short]


def decode(raw: Bytes, dtype: DType, out: Floats) -> None:
    """Convert stored bytes to float32; exact but for F64.

    Args:
        raw: `[dtype.nbytes(N)]` bytes as stored.
        dtype: a floating format.
        out: `[N]`, overwritten.
    """
    if dtype.name in ("BF16", "F32", "F16", "F64"):
        np.copyto(out, raw.view(_numpy(dtype)), casting="unsafe")
    elif dtype.floating:
        np.take(_float8_values(dtype), raw, out=out)
    else:
        raise UnsupportedError(f"tensors of dtype {dtype.name} cannot be computed with")


def encode(values: Floats, dtype: DType) -> Bytes:
    """Round float32 values to a format, to nearest with ties to even.

    Args:
        values: `[N]`; may be overwritten.
        dtype: a floating format.

    Returns:
        `[dtype.nbytes(N)]` bytes; they may share memory with `values`.
    """
    if dtype.name == "F32":
        return values.view(np.uint8)
    if not dtype.floating:
        raise UnsupportedError(f"results cannot be stored as {dtype.name}")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(_numpy(dtype)).view(np.uint8)


def all_finite(raw: Bytes, dtype: DType) -> bool:
    """Tell whether stored values hold neither NaN nor infinity; integers never do."""
    if dtype.name in _INFINITY:
        # The bits of NaN and infinity are the largest: as signed numbers, and where the sign is set as unsigned ones.
        infinity, size = _INFINITY[dtype.name], dtype.bits // 8
        highest, lowest = (raw.view(f"{kind}{size}").max(initial=0) for kind in "iu")
        return bool(highest < infinity and lowest < infinity | 1 << (dtype.bits - 1))
    if not dtype.floating:
        return True
    values = np.empty(raw.size * 8 // dtype.bits, np.float32)
    decode(raw, dtype, values)
    return bool(np.isfinite(values).all())


_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
"""Formats -> the bits of infinity; those of a NaN are larger."""


@cache
def _numpy(dtype: DType) -> np.dtype:
    if dtype.name in ("F64", "F32", "F16"):
        return np.dtype(dtype.torch)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, dtype.torch))


@cache
def _float8_values(dtype: DType) -> Floats:
    return np.arange(256, dtype=np.uint8).view(_numpy(dtype)).astype(np.float32)
