"""Attention of several queries per sequence: against one softmax per query and head, with gradients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.kernels.attention import Case, assert_near, check
from tests.kernels.harness import DEVICE, DOT_DTYPES, INTERPRETED, count_traffic, mutated
from toolkit.kernels.launch import Configuration, record
from toolkit.kernels.prefill_attention import packed_attention, prefill_attention, torch_form, triton_form
from toolkit.kernels.prefill_attention import triton as kernels

pytestmark = [pytest.mark.usefixtures("nan_outputs"), pytest.mark.system("flash_attention_2")]
IMPLS = pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
LENGTHS, QUERIES = [5, 19, 9, 1, 4, 3], [5, 11, 9, 1, 1, 0]
SETTINGS = {
    "causal": {},
    "window": {"window": 7},
    "Lambda": {"window": 7, "num_global": 5},
    "soft cap": {"soft_cap": 2.0},
    "window and soft cap": {"window": 3, "soft_cap": 2.0},
    "sinks": {"sinks_H": torch.linspace(-2, 3, 6, device=DEVICE)},
    "all at once": {"window": 7, "num_global": 5, "soft_cap": 2.0, "sinks_H": torch.linspace(-2, 3, 6, device=DEVICE)},
    "other positions": {"positions": [-2, 50, 3, 0, -1, 0]},
    "other positions and Lambda": {"positions": [-2, 50, 3, 0, -1, 0], "window": 3, "num_global": 9},
}


def run(case, impl, **options):
    return prefill_attention(
        case.q, case.k_cache, case.v_cache, case.starts, case.lengths, case.tables, scale=0.3, impl=impl, **options
    )


@IMPLS
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_masks_and_scores(impl, options):
    case = Case(LENGTHS, QUERIES)
    check(run(case, impl, **options), case.exact(0.3, **options), run(case, "reference", **options))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, *(d for d in (torch.bfloat16,) if d in DOT_DTYPES)])
@pytest.mark.parametrize("name", ["causal", "all at once"])
def test_low_precision(impl, dtype, name):
    case, options = Case(LENGTHS, QUERIES, dtype), SETTINGS[name]
    check(run(case, impl, **options), case.exact(0.3, **options), run(case, "reference", **options))


@pytest.mark.parametrize("size", [8, 32, 80, 256])
@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (4, 4)], ids=["one head", "one key head", "a key head each"])
def test_heads_and_sizes(size, heads):
    case = Case([19, 6], [7, 2], heads=heads, size=size)
    check(run(case, "triton"), case.exact(0.3), run(case, "reference"))


def test_sizes_of_tiles_do_not_matter(monkeypatch):
    case = Case([5, 19, 3], [5, 11, 0])
    options = SETTINGS["Lambda"]
    expected = case.exact(0.3, **options)
    for rows, keys in ((16, 4), (8, 16), (64, 64)):
        set_blocks(monkeypatch, rows, keys, 32)
        check(run(case, "triton", **options), expected, run(case, "reference", **options))
    monkeypatch.setattr(torch_form, "BLOCK", 3)
    check(run(case, "torch", **options), expected, run(case, "reference", **options))


def set_blocks(monkeypatch, rows, keys, size):
    found = Configuration({"BLOCK_M": rows, "BLOCK_N": keys, "BLOCK_D": size}, 4, 1)
    monkeypatch.setattr(triton_form.TABLE, "choose", lambda *_, **__: found)


@IMPLS
def test_packed_sequences_are_those_alone(impl):
    case = Case([9, 21, 1], [9, 4, 1])
    together = run(case, impl)
    for i, n in enumerate(case.lengths):
        rows = slice(case.starts[i], case.starts[i + 1])
        alone = prefill_attention(
            case.q[rows], case.k_cache, case.v_cache, [0, case.queries[i]], [n], case.tables[i : i + 1], scale=0.3,
            impl=impl,
        )  # fmt: skip
        torch.testing.assert_close(alone, tuple(t[rows] for t in together), rtol=2e-6, atol=1e-6)


@IMPLS
@pytest.mark.parametrize("positions", [[-5, -9], [-2, 0]])
def test_queries_that_see_nothing(impl, positions):
    case = Case([4, 0], [3, 2])
    out, lse = run(case, impl, positions=positions)
    none = torch.tensor([position + row < 0 for position, n in zip(positions, (3, 2), strict=True) for row in range(n)])
    none[3:] = True
    assert not out[none].any()
    assert (lse[none] == -torch.inf).all()
    assert torch.isfinite(lse[~none]).all()
    assert torch.isfinite(out).all()


@IMPLS
def test_large_scores(impl):
    case = Case([17], [17], heads=(2, 1))
    case.q *= 1e4
    out, _ = run(case, impl)
    exact = case.exact(0.3)
    # At scores of 10,000 a float32 product is 0.001 off, wherever it is made.
    torch.testing.assert_close(out.double().cpu(), exact[0], rtol=0, atol=0.02)
    assert torch.isfinite(out).all()


@pytest.mark.skipif(not INTERPRETED, reason="loads are counted in the interpreter")
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 5, "num_global": 6}], ids=str)
def test_only_tiles_that_are_seen_are_read(options, monkeypatch):
    rows, keys, length, queries = 8, 4, 37, 31
    set_blocks(monkeypatch, rows, keys, 8)
    case = Case([length], [queries], heads=(1, 1), size=8)
    with count_traffic(case.k_cache, case.v_cache) as counts:
        run(case, "triton", **options)
    visited = set()
    for row, t in itertools.product(range(queries), range(length)):
        at = length - queries + row
        near = "window" not in options or t > at - options["window"] or t < options.get("num_global", 0)
        if t <= at and near:
            visited.add((row // rows, t // keys))
    tokens = sum(min(keys, length - tile * keys) for _, tile in visited)
    assert len(visited) < 4 * 10
    assert [count.loaded for count in counts] == [tokens * 8 * 4] * 2


def test_tensors_may_lie_anywhere():
    case = Case(LENGTHS, QUERIES, torch.float16)
    expected = run(case, "triton")
    wide = torch.full((len(case.q), 9, 40), torch.nan, dtype=torch.float16, device=DEVICE)
    q = wide[:, 2:8, 3:27]
    q.copy_(case.q)
    k_cache, v_cache = (t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in (case.k_cache, case.v_cache))
    tables = torch.stack([case.tables, case.tables], dim=1)[:, 0]
    got = prefill_attention(q, k_cache, v_cache, case.starts, case.lengths, tables, scale=0.3, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="takes memory that is not there on a GPU")
def test_offsets_beyond_two_to_the_31():
    """Memory that is never touched costs nothing, so strides are large without anything being allocated."""
    case = Case([9, 21], [9, 4], torch.float16)
    expected = run(case, "triton")
    far = 2**29 + 48
    pages, page, heads, size = case.k_cache.shape
    memory = torch.empty_strided((14 * far,), (1,), dtype=torch.float16)
    assert case.tables.max() * far > 2**31
    k_cache, v_cache = (memory.as_strided((pages, page, heads, size), (far, 64, 32, 1), start) for start in (0, 2048))
    q = memory.as_strided((13, 6, size), (far, 32, 1), 4096)
    for view, values in ((k_cache, case.k_cache), (v_cache, case.v_cache), (q, case.q)):
        view.copy_(values)
    got = prefill_attention(q, k_cache, v_cache, case.starts, case.lengths, case.tables, scale=0.3, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


PACKED = {name: options for name, options in SETTINGS.items() if "positions" not in options}


class Packed:
    """Sequences one after another, with more keys than queries, none, and fewer keys than queries."""

    def __init__(self, dtype=torch.float64, size=24, heads=(6, 2)):
        torch.manual_seed(1)
        lengths, queries = [7, 37, 0, 5], [7, 20, 3, 8]
        self.starts, self.key_starts = ([0, *itertools.accumulate(n)] for n in (queries, lengths))
        shapes = [(self.starts[-1], heads[0]), (self.key_starts[-1], heads[1]), (self.key_starts[-1], heads[1])]
        self.leaves = [torch.randn(*shape, size).to(DEVICE, dtype) for shape in shapes]
        self.dout = torch.randn(self.starts[-1], heads[0], size).to(DEVICE, dtype)
        self.dlse = torch.randn(self.starts[-1], heads[0], device=DEVICE)

    def gradients(self, impl, dtype=None, **options):
        leaves = [t.to(dtype or t.dtype).requires_grad_() for t in self.leaves]
        if "sinks_H" in options:
            leaves.append(options["sinks_H"].to(torch.float64 if dtype == torch.float64 else torch.float32))
            options["sinks_H"] = leaves[-1].requires_grad_()
        out, lse = packed_attention(*leaves[:3], self.starts, self.key_starts, scale=0.3, impl=impl, **options)
        loss = (out * self.dout.to(out.dtype)).sum() + (lse.masked_fill(lse == -torch.inf, 0) * self.dlse).sum()
        return [out, *torch.autograd.grad(loss, leaves)]

    def dense_gradients(self, **options):
        """Autograd of one matrix of all scores in float64."""
        q, k, v = (t.double().requires_grad_() for t in self.leaves)
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * 0.3
        cap, sinks = options.get("soft_cap"), options.get("sinks_H")
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        seen = torch.zeros(scores.shape[1:], dtype=torch.bool, device=DEVICE)
        for i, (start, key) in enumerate(zip(self.starts[:-1], self.key_starts[:-1], strict=True)):
            queries, length = self.starts[i + 1] - start, self.key_starts[i + 1] - key
            for row, t in itertools.product(range(queries), range(length)):
                at = length - queries + row
                near = t > at - options.get("window", 10**6) or t < options.get("num_global", 0)
                seen[start + row, key + t] = t <= at and near
        weights = torch.exp(scores).masked_fill(~seen, 0)
        total = weights.sum(-1)
        leaves = [q, k, v]
        if sinks is not None:
            leaves.append(sinks.double().requires_grad_())
            total = total + torch.exp(leaves[-1])[:, None]
        safe = total + (total == 0)
        out = torch.einsum("hqk,khd->qhd", weights / safe[..., None], v.repeat_interleave(group, 1))
        loss = (out * self.dout.double()).sum() + (torch.log(safe).T * self.dlse).sum()
        return [out, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_gradients_are_those_of_the_dense_form(options):
    case = Packed()
    exact = case.dense_gradients(**options)
    for got, expected in zip(case.gradients("reference", torch.float64, **options), exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    for got, expected in zip(case.gradients("triton", torch.float32, **options), exact, strict=True):
        assert_near(got, expected, 4e-6)


def test_gradients_in_float16():
    case = Packed(torch.float16)
    exact = case.dense_gradients()
    for got, expected, eager in zip(case.gradients("triton"), exact, case.gradients("reference"), strict=True):
        check_columns(got, expected, eager)


def check_columns(got, exact, eager):
    """The stick over whole columns: a row of a gradient may be zero but for rounding."""
    got, exact, eager = (t.detach().double().reshape(-1, t.shape[-1]) for t in (got, exact, eager))
    error, allowed = (got - exact).norm(dim=0), (eager - exact).norm(dim=0)
    assert (error <= 2 * torch.maximum(allowed, 0.5 * torch.finfo(torch.float16).eps * exact.norm(dim=0))).all()


@pytest.mark.parametrize(("rows", "keys"), [(8, 4), (4, 16)])
def test_gradients_do_not_depend_on_tiles(rows, keys, monkeypatch):
    case = Packed(size=8, heads=(2, 1))
    set_blocks(monkeypatch, rows, keys, 8)
    options = {"window": 7, "num_global": 5}
    for got, expected in zip(
        case.gradients("triton", torch.float32, **options), case.dense_gradients(**options), strict=True
    ):
        assert_near(got, expected, 4e-6)


def test_backward_keeps_only_what_the_size_of_the_inputs_is():
    case = Packed(torch.float32)
    leaves = [t.requires_grad_() for t in case.leaves]
    out, lse = packed_attention(*leaves, case.starts, case.key_starts, scale=0.3, impl="triton")
    kept = [tuple(t.shape) for t in out.grad_fn.saved_tensors if t is not None]
    assert kept == [tuple(t.shape) for t in (*leaves, out, lse)]


FAULTS = {
    "scale off by 2%": ('input_precision="ieee") * scale', 'input_precision="ieee") * scale * 1.02'),
    "a head with the values of another": ("v_ptr += head.to", "v_ptr += (1 - head).to"),
    "last columns dropped": ("(ds < SIZE)[None, :]\n    q_ptrs", "(ds < SIZE - 1)[None, :]\n    q_ptrs"),
    "a diagonal left out": ("ns[None, :] <= positions[:, None]", "ns[None, :] < positions[:, None]"),
    "a last tile left out": (
        "stop = tl.cdiv(tl.maximum(tl.minimum(length, last + 1), 0), BLOCK_N)",
        "stop = last // BLOCK_N",
    ),
}


@pytest.mark.parametrize(("before", "after"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(before, after, monkeypatch):
    case = Case([5, 37], [5, 20], torch.float16)
    check(run(case, "triton"), case.exact(0.3), run(case, "reference"))

    def change(source):
        assert before in source
        return source.replace(before, after)

    monkeypatch.setattr(triton_form.kernels, "_forward", mutated(kernels._forward, change))
    with pytest.raises(AssertionError):
        check(run(case, "triton"), case.exact(0.3), run(case, "reference"))


def test_the_most_work_comes_first():
    case = Case([100, 9, 40], [100, 9, 2])
    with record(run=False) as launches:
        run(case, "triton")
    items, block = launches[0].arguments["items_ptr"].tolist(), launches[0].configuration.constants["BLOCK_M"]
    assert {(item[4], item[5]) for item in items} == {
        (i, row) for i, n in enumerate(case.queries) for row in range(0, 3 * n, block)
    }
    keys = [min(length, position + row // 3) for _, _, position, length, _, row in items]
    assert np.all(np.diff(keys) <= 0)


def test_what_does_not_fit_is_refused():
    case = Case([5], [5])
    with pytest.raises(ValueError, match="do not fit"):
        prefill_attention(case.q[:, :5], case.k_cache, case.v_cache, [0, 5], [5], case.tables, scale=1.0)
    with pytest.raises(ValueError, match="different types"):
        prefill_attention(case.q.half(), case.k_cache, case.v_cache, [0, 5], [5], case.tables, scale=1.0)
    with pytest.raises(ValueError, match="next to each other"):
        prefill_attention(case.q.mT.contiguous().mT, case.k_cache, case.v_cache, [0, 5], [5], case.tables, scale=1.0)
    for options, message in (
        ({"window": 0}, "sees itself"),
        ({"num_global": -1}, "global tokens"),
        ({"soft_cap": 0.0}, "above 0"),
        ({"sinks_H": torch.zeros(2)}, "sinks of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            run(case, "reference", **options)
    with pytest.raises(ValueError, match="sequences begin"):
        packed_attention(case.q, case.k[0], case.v[0], [0, 4], scale=1.0)
