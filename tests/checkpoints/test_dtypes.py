"""Conversions agree with torch's, element by element, on every bit pattern that matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolkit.checkpoints.dtypes import DTYPES, all_finite, by_torch_name, decode, encode
from toolkit.errors import UnsupportedError

FLOATING = [d for d in DTYPES.values() if d.floating]


def interesting() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (20000,), generator=generator, dtype=torch.int64).to(torch.int32)
    halves = torch.arange(0, 2**16, dtype=torch.int64).to(torch.int32) * 2**16
    ties = halves + 2**15  # exactly between two bfloat16
    small = torch.linspace(-300, 300, 4001)
    bits = torch.cat([patterns, halves, ties, ties + 1, ties - 1]).view(torch.float32)
    return torch.cat([bits, small, small / 1000])


@pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: d.name)
def test_decode_equals_torch(dtype):
    kind = getattr(torch, dtype.torch)
    if dtype.bits == 8:
        stored = torch.arange(256, dtype=torch.uint8).view(kind)
    else:
        stored = interesting().to(torch.float64).to(kind)
    raw = stored.contiguous().view(torch.uint8).numpy()
    out = np.empty(stored.numel(), np.float32)
    decode(raw, dtype, out)
    np.testing.assert_array_equal(out, stored.to(torch.float32).numpy())


@pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: d.name)
def test_encode_rounds_as_torch_does(dtype):
    values = interesting()
    if dtype.bits == 8:
        values = values[values.abs() < 240]  # beyond its range torch and others differ in what saturates
    expected = values.to(getattr(torch, dtype.torch))
    got = encode(values.numpy().copy(), dtype)
    got = torch.frombuffer(bytearray(got), dtype=expected.dtype)
    both_nan = got.float().isnan() & expected.float().isnan()
    assert torch.equal(got.float()[~both_nan], expected.float()[~both_nan])
    assert torch.equal(got.float().isnan(), expected.float().isnan())


def test_names_of_torch_and_of_specs():
    assert by_torch_name("bfloat16") == by_torch_name("torch.bfloat16") == by_torch_name("bf16") == DTYPES["BF16"]
    with pytest.raises(UnsupportedError, match="unknown dtype 'bfloat61'"):
        by_torch_name("bfloat61")


def test_sub_byte_formats_are_sized_but_not_computed_with():
    four = DTYPES["F4"]
    assert four.nbytes(7) == 4
    with pytest.raises(UnsupportedError, match="F4"):
        decode(np.zeros(4, np.uint8), four, np.empty(7, np.float32))


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_what_is_not_finite_is_found_in_the_stored_bytes(name):
    dtype = getattr(torch, name)
    info = torch.finfo(dtype)
    values = torch.tensor([0.0, -1.5, info.max, info.min, info.tiny], dtype=torch.float64).to(dtype)

    def finite(x: torch.Tensor) -> bool:
        return all_finite(x.view(torch.uint8).numpy(), by_torch_name(name))

    assert finite(values)
    has_infinity = name != "float8_e4m3fn"
    for bad in ("nan", "inf", "-inf") if has_infinity else ("nan",):
        assert not finite(torch.cat([values, torch.tensor([float(bad)]).to(dtype)]))
    assert all_finite(np.full(8, 255, np.uint8), by_torch_name("int64"))
