"""Keys and values in 8 or 4 bits: errors within half a step, and attention over what the codes stand for."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention import Case, check
from tests.kernels.harness import DEVICE, DOT_DTYPES, INTERPRETED, mutated
from toolkit.kernels.decode_attention import SharedPrefix, decode_attention, quantized_decode_attention
from toolkit.kernels.decode_attention import triton as decode_kernels
from toolkit.kernels.kv_quant import QuantizedCache, quantize_pages
from toolkit.kernels.kv_quant import triton as kernels
from toolkit.kernels.merge_states import merge_states

pytestmark = pytest.mark.usefixtures("nan_outputs")
PAGE = 16
BITS = pytest.mark.parametrize("bits", [8, 4])
FORMS = pytest.mark.parametrize("impl", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def pages_of(case):
    """Every page of every sequence once, each at another number, and its tokens."""
    found = {}
    for row, length in zip(case.tables.tolist(), case.lengths, strict=True):
        for i in range(-(-length // PAGE)):
            found[row[i]] = min(PAGE, length - i * PAGE)
    count = len(case.k_cache)
    return [(page, count - 1 - page, tokens) for page, tokens in found.items()]


def quantized(case, bits, impl):
    heads, size = case.k_cache.shape[2:]
    cache = QuantizedCache.empty(
        len(case.k_cache), PAGE, heads, size, bits=bits, dtype=case.q.dtype, device=case.q.device
    )
    quantize_pages(case.k_cache, case.v_cache, cache, pages_of(case), impl=impl)
    return cache


@FORMS
@BITS
@DTYPES
def test_errors_are_within_half_a_step(impl, bits, dtype):
    case = Case([70, 16, 1], dtype=dtype, page=PAGE)
    case.k_cache[:, :, 0, 3] = 7.5  # a channel whose tokens are all equal
    case.k_cache[:, :, 1, 5] *= 100  # an outlier
    cache = quantized(case, bits, impl)
    levels = 2**bits - 1
    for source, target, count in pages_of(case):
        k, v = (t[0] for t in cache.read(torch.tensor([target], device=DEVICE)))
        for got, exact, dim in ((k, case.k_cache, 0), (v, case.v_cache, 2)):
            exact = exact[source, :count].double()
            spread = exact.amax(dim, keepdim=True) - exact.amin(dim, keepdim=True)
            eps = torch.finfo(dtype).eps
            # A step may be a rounding larger than it need be, and what the codes stand for is rounded once more.
            limit = spread / levels / 2 * (1 + 2 * eps) + eps / 2 * exact.abs().clamp_min(spread) + 1e-6
            assert ((got[:count].double() - exact).abs() <= limit).all()
        assert torch.equal(k[:count, 0, 3], torch.full_like(k[:count, 0, 3], 7.5))
        codes = [cache.k_codes[target], cache.v_codes[target]]
        assert not any(c[:, count:].any() for c in codes)


@BITS
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_the_kernel_makes_the_codes_of_the_reference(bits, dtype):
    case = Case([40, 7], dtype=dtype, page=PAGE, size=20)
    names = ("k_codes", "k_scale", "k_low", "v_codes", "v_scale", "v_low")
    caches = [quantized(case, bits, impl) for impl in ("triton", "reference")]
    assert all(torch.equal(getattr(caches[0], name), getattr(caches[1], name)) for name in names)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_every_pair_of_half_bytes_is_kept(impl):
    pairs = torch.tensor([(a, b) for a in range(16) for b in range(16)], dtype=torch.float32, device=DEVICE)
    # Every token has 0 and 15 among its features, so that steps are 1 and codes the numbers themselves.
    numbers = torch.cat([pairs.view(16, 1, 32), torch.tensor([0.0, 15.0], device=DEVICE).expand(16, 1, 2)], dim=2)
    numbers = numbers[None].contiguous()
    cache = QuantizedCache.empty(1, 16, 1, 34, bits=4, dtype=torch.float32, device=DEVICE)
    quantize_pages(numbers, numbers, cache, [(0, 0, 16)], impl=impl)
    v = cache.read(torch.tensor([0], device=DEVICE))[1]
    torch.testing.assert_close(v, numbers, rtol=1e-6, atol=1e-6)
    assert len(set(cache.v_codes[0, 0, :, :16].flatten().tolist())) == 256


@pytest.mark.parametrize("impl", ["triton", "torch"])
@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *(d for d in (torch.bfloat16,) if d in DOT_DTYPES)])
@pytest.mark.parametrize(
    "options", [{}, {"window": 19, "num_global": 5, "soft_cap": 2.0}], ids=["all tokens", "window and cap"]
)
def test_attention_over_codes(impl, bits, dtype, options):
    case = Case([5, 70, 0, 33], dtype=dtype, page=PAGE)
    cache = quantized(case, bits, "reference")
    got = attend(case, cache, impl, **options)
    # What the codes stand for, as the keys and values of the oracle.
    for i, length in enumerate(case.lengths):
        k, v = cache.read(own_tables(case)[i])
        case.k[i], case.v[i] = k.flatten(0, 1)[:length], v.flatten(0, 1)[:length]
    check(got, case.exact(0.3, **options), attend(case, cache, "reference", **options))


def own_tables(case):
    return len(case.k_cache) - 1 - case.tables


def attend(case, cache, impl, **options):
    return quantized_decode_attention(case.q, cache, case.lengths, own_tables(case), scale=0.3, impl=impl, **options)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_shared_prefixes_of_codes(impl):
    case = Case([40, 33, 77], page=PAGE)
    case.place(PAGE, common=(0, 1, 2), tokens=32)
    cache = quantized(case, 8, "reference")
    got = attend(case, cache, impl, prefixes=[SharedPrefix((0, 1, 2), 32)])
    torch.testing.assert_close(got, attend(case, cache, "reference"), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("impl", ["triton", None])
def test_a_last_page_in_full_precision_is_merged(impl):
    case = Case([70, 40], page=PAGE)
    cache = quantized(case, 8, "reference")
    whole = [n // PAGE * PAGE for n in case.lengths]
    last = case.tables[range(2), [n // PAGE for n in whole]][:, None]
    rest = [n - m for n, m in zip(case.lengths, whole, strict=True)]
    codes = quantized_decode_attention(case.q, cache, whole, own_tables(case), scale=0.3, impl=impl)
    full = decode_attention(case.q, case.k_cache, case.v_cache, rest, last, scale=0.3, impl=impl)
    got = merge_states(*(torch.stack(pair) for pair in zip(codes, full, strict=True)), impl=impl)
    for i, tokens in enumerate(whole):
        k, v = cache.read(own_tables(case)[i])
        case.k[i][:tokens], case.v[i][:tokens] = k.flatten(0, 1)[:tokens], v.flatten(0, 1)[:tokens]
    check(got, case.exact(0.3), got)


def test_fewer_bits_take_fewer_bytes_and_are_further_off():
    case = Case([96, 40], page=PAGE)
    exact, errors, sizes = case.exact(0.3)[0], [], []
    for bits in (8, 4):
        cache = quantized(case, bits, "triton")
        errors.append(float((attend(case, cache, "triton")[0].double().cpu() - exact).norm() / exact.norm()))
        sizes.append(cache.nbytes)
    assert errors[0] < 0.01 < errors[1] < 0.2
    pages, page, heads, size = case.k_cache.shape
    parameters = 2 * 4 * pages * heads * (size + page)
    assert sizes == [2 * pages * page * heads * size * bits // 8 + parameters for bits in (8, 4)]


FAULTS = {
    "scale off by 2%": (decode_kernels, "_attend", "v *= tl.load(v_scale_ptr", "v *= 1.02 * tl.load(v_scale_ptr"),
    "scales of another head": (decode_kernels, "_attend", "k_scale_ptr + page", "k_scale_ptr + (page ^ 1)"),
    "last columns dropped": (decode_kernels, "_attend", "(ds < WIDTH)", "(ds < WIDTH - 1)"),
    "halves the wrong way round": (decode_kernels, "_attend", "codes & 15, codes >> 4", "codes >> 4, codes & 15"),
    "a token left out of the range": (kernels, "_quantize", "exists = (ns < count)", "exists = (ns < count - 1)"),
}  # fmt: skip


@pytest.mark.parametrize(("module", "name", "before", "after"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(module, name, before, after, monkeypatch):
    case = Case([5, 37], dtype=torch.float16, page=PAGE)

    def change(source):
        assert before in source
        return source.replace(before, after)

    monkeypatch.setattr(module, name, mutated(getattr(module, name), change))
    expected = attend(case, quantized(case, 4, "reference"), "reference")
    got = attend(case, quantized(case, 4, "triton"), "triton")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, expected, rtol=4e-3, atol=4e-3)
    monkeypatch.undo()
    got = attend(case, quantized(case, 4, "triton"), "triton")
    torch.testing.assert_close(got, expected, rtol=4e-3, atol=4e-3)


def test_what_does_not_fit_is_refused():
    options = {"dtype": torch.float32, "device": DEVICE}
    for page, size, bits in ((16, 8, 3), (8, 8, 4), (24, 8, 4), (16, 7, 8)):
        with pytest.raises(ValueError, match="4 or 8 bits"):
            QuantizedCache.empty(2, page, 1, size, bits=bits, **options)
    cache = QuantizedCache.empty(2, 16, 1, 8, bits=8, **options)
    full = torch.zeros(2, 16, 1, 8, device=DEVICE)
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        quantize_pages(full, full, cache, [(0, 0, 0)])
    with pytest.raises(ValueError, match="for a cache of"):
        quantize_pages(full.half(), full.half(), cache, [(0, 0, 1)])
    with pytest.raises(ValueError, match="queries"):
        quantized_decode_attention(full[:, 0].half(), cache, [1, 1], torch.zeros(2, 1, dtype=torch.int64), scale=1.0)


@pytest.mark.skipif(not INTERPRETED, reason="takes memory that is not there on a GPU")
def test_pages_beyond_two_to_the_31():
    """Memory that is never touched costs nothing, so pages lie far apart without being allocated."""
    case = Case([40, 7], dtype=torch.float16, page=PAGE)
    expected, far = quantized(case, 8, "triton"), 2**29 + 48
    pages = len(case.k_cache)
    memory = torch.empty_strided((pages * far,), (1,), dtype=torch.float16)
    assert max(source for source, _, _ in pages_of(case)) * far > 2**31
    caches = [memory.as_strided(case.k_cache.shape, (far, 64, 32, 1), start) for start in (0, 2048)]
    for view, values in zip(caches, (case.k_cache, case.v_cache), strict=True):
        view.copy_(values)
    case.k_cache, case.v_cache = caches
    got = quantized(case, 8, "triton")
    written = [target for _, target, _ in pages_of(case)]
    names = ("k_codes", "k_scale", "k_low", "v_codes", "v_scale", "v_low")
    assert all(torch.equal(getattr(got, name)[written], getattr(expected, name)[written]) for name in names)
