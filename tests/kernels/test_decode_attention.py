"""Attention of one query per sequence: work divided evenly, keys read once, and the same as one softmax."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.attention import Case, check
from tests.kernels.harness import DEVICE, DOT_DTYPES, INTERPRETED, count_traffic, mutated
from toolkit.kernels.decode_attention import SharedPrefix, decode_attention, torch_form, triton_form
from toolkit.kernels.decode_attention import triton as kernels
from toolkit.kernels.decode_attention.plan import Span, divide, list_spans, merge_lists
from toolkit.kernels.launch import GENERATIONS, record
from toolkit.kernels.scoring import Scoring

pytestmark = [pytest.mark.usefixtures("nan_outputs"), pytest.mark.system("lean_attention")]
IMPLS = pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
LENGTHS = [5, 137, 0, 39, 1, 64]
SINKS = torch.linspace(-2, 3, 6, device=DEVICE)
SETTINGS = {
    "all tokens": {},
    "window": {"window": 7},
    "Lambda": {"window": 30, "num_global": 5},
    "soft cap": {"soft_cap": 2.0},
    "sinks": {"sinks_H": SINKS},
    "all at once": {"window": 30, "num_global": 5, "soft_cap": 2.0, "sinks_H": SINKS},
}


def run(case, impl, **options):
    return decode_attention(
        case.q, case.k_cache, case.v_cache, case.lengths, case.tables, scale=0.3, impl=impl, **options
    )


@IMPLS
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_masks_and_scores(impl, options):
    case = Case(LENGTHS)
    check(run(case, impl, **options), case.exact(0.3, **options), run(case, "reference", **options))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, *(d for d in (torch.bfloat16,) if d in DOT_DTYPES)])
def test_low_precision(impl, dtype):
    case, options = Case(LENGTHS, dtype=dtype), SETTINGS["all at once"]
    check(run(case, impl, **options), case.exact(0.3, **options), run(case, "reference", **options))


@pytest.mark.parametrize("size", [8, 80, 256])
@pytest.mark.parametrize("heads", [(20, 1), (3, 3)], ids=["one key head", "a key head each"])
def test_heads_and_sizes(size, heads):
    case = Case([33, 2], heads=heads, size=size)
    check(run(case, "triton"), case.exact(0.3), run(case, "reference"))


@IMPLS
def test_a_ragged_batch_is_each_request_alone(impl):
    case = Case(LENGTHS)
    together = run(case, impl)
    for i, n in enumerate(LENGTHS):
        rows = slice(i, i + 1)
        alone = decode_attention(case.q[rows], case.k_cache, case.v_cache, [n], case.tables[rows], scale=0.3, impl=impl)
        torch.testing.assert_close(alone, tuple(t[rows] for t in together), rtol=2e-6, atol=1e-6)
    assert not together[0][2].any()
    assert (together[1][2] == -torch.inf).all()


@IMPLS
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("known", ["all", "some"])
def test_sequences_whose_pages_follow_each_other(impl, options, known, monkeypatch):
    """Where they lie is a hint: nothing is copied, and what lies beside them is not looked at."""
    monkeypatch.setattr(torch_form, "WORTH_A_CALL", 5 * 2 * 24 * 4)
    case = Case(LENGTHS)
    expected = run(case, "reference", **options)
    case.place(4, shuffled=False)
    first = case.tables[:, 0].tolist()
    pages = [page if known == "all" or i % 2 else None for i, page in enumerate(first)]
    check(run(case, impl, first_pages=pages, **options), case.exact(0.3, **options), expected)


def test_what_lies_together_is_not_copied(monkeypatch):
    case = Case([40, 33])
    case.place(4, shuffled=False)
    monkeypatch.setattr(torch_form, "WORTH_A_CALL", 0)
    monkeypatch.setattr(torch_form, "_padded", None)
    out, _ = run(case, "torch", first_pages=case.tables[:, 0].tolist())
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("window", [None, 7])
def test_sequences_of_one_length_that_lie_equally_far_apart_are_one_call(window, monkeypatch):
    case = Case([13, 13, 13, 13, 13, 9, 0])
    case.place(4, shuffled=False)
    monkeypatch.setattr(torch_form, "WORTH_A_CALL", 0)
    calls, dense = [], torch_form.dense_attention
    monkeypatch.setattr(torch_form, "dense_attention", lambda q, *rest: calls.append(len(q)) or dense(q, *rest))
    got = run(case, "torch", first_pages=case.tables[:, 0].tolist(), window=window)
    check(got, case.exact(0.3, window=window), run(case, "reference", window=window))
    assert sorted(calls) == [1, 5]


def test_one_sequence_with_two_spans_beside_one_with_none():
    case, options = Case([40, 0]), {"window": 9, "num_global": 3}
    check(run(case, "torch", **options), case.exact(0.3, **options), run(case, "reference", **options))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("length", [32, 30], ids=["whole pages", "part of a page"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_shared_prefix_changes_nothing(impl, length, dtype):
    case = Case([40, 32, 77, 5, 33], dtype=dtype)
    case.place(4, common=(0, 1, 2, 4), tokens=32)
    options = {"prefixes": [SharedPrefix((0, 1, 2, 4), length)]}
    expected = case.exact(0.3)
    check(run(case, impl, **options), expected, run(case, "reference"))
    check(run(case, impl, window=9, **options), case.exact(0.3, window=9), run(case, "reference", window=9))


@pytest.mark.skipif(not INTERPRETED, reason="loads are counted in the interpreter")
@pytest.mark.parametrize("options", [{}, {"window": 20, "num_global": 3}], ids=["all", "Lambda"])
def test_keys_are_read_once(options):
    case = Case([70, 41, 0, 9], heads=(4, 2), size=8)
    with count_traffic(case.k_cache, case.v_cache) as counts:
        run(case, "triton", **options)
    tokens = [n if not options else min(n, 20) + min(3, max(0, n - 20)) for n in case.lengths]
    assert [count.loaded for count in counts] == [sum(tokens) * 2 * 8 * 4] * 2


@pytest.mark.skipif(not INTERPRETED, reason="loads are counted in the interpreter")
def test_shared_pages_are_read_once_for_all():
    case = Case([40, 33, 36, 5], heads=(4, 2), size=8)
    case.place(4, common=(0, 1, 2), tokens=32)
    with count_traffic(case.k_cache) as (count,):
        run(case, "triton", prefixes=[SharedPrefix((0, 1, 2), 32)])
    assert count.loaded == (32 + 8 + 1 + 4 + 5) * 2 * 8 * 4


SPANS = [Span((0,), 0, 100), Span((1,), 37, 39), Span((2, 3, 4), 0, 64), Span((5,), 63, 65), Span((3,), 64, 600)]


@pytest.mark.parametrize("spans", [SPANS, SPANS[:1], SPANS[1:2], []], ids=["many", "one", "tiny", "none"])
@pytest.mark.parametrize("programs", [1, 2, 7, 264])
@pytest.mark.parametrize("heads", [1, 3])
def test_tiles_are_divided_evenly(spans, programs, heads):
    block, group = 16, 2
    work = divide(spans, heads, group, block, programs, first_row=10)
    wanted = {
        (span.members, head, tile)
        for span in spans
        for head in range(heads)
        for tile in range(span.first // block, -(-span.stop // block))
    }
    done, loads, rows = [], [], []
    for start, stop in zip(work.bounds[:-1], work.bounds[1:], strict=True):
        mine = []
        for begin, count, table, head, first, last, row in work.pieces[start:stop].tolist():
            members = tuple(work.members[begin : begin + count].tolist())
            span = next(s for s in spans if s.members == members and s.first <= first < last <= s.stop)
            assert table == members[0]
            assert first == span.first or first % block == 0
            assert last == span.stop or last % block == 0
            mine += [(members, head, tile) for tile in range(first // block, -(-last // block))]
            rows += range(row, row + count * group)
        done, loads = done + mine, [*loads, len(mine)]
    assert len(done) == len(wanted)
    assert set(done) == wanted
    assert len(loads) == min(programs, len(wanted))
    assert not loads or max(loads) - min(loads) <= 1
    assert sorted(rows) == list(range(10, 10 + work.rows))


def test_a_head_is_merged_of_all_its_pieces():
    work = divide(SPANS, heads=2, group=3, block=16, programs=7)
    bounds, entries = merge_lists([work], sequences=6, heads=2, group=3)
    for sequence in range(6):
        for head in range(2):
            own = entries[bounds[sequence * 2 + head] : bounds[sequence * 2 + head + 1]]
            expected = [
                row + 3 * work.members[begin : begin + count].tolist().index(sequence)
                for begin, count, _, of, _, _, row in work.pieces.tolist()
                if of == head and sequence in work.members[begin : begin + count]
            ]
            assert own.tolist() == expected


def test_spans_cover_what_is_seen():
    lengths, prefixes = [100, 50, 3, 0], [SharedPrefix((0, 1), 48)]
    for window, num_global in ((None, 0), (10, 0), (10, 4), (60, 70)):
        shared, own = list_spans(lengths, prefixes, Scoring(1.0, window, num_global))
        seen = {(m, t) for span in shared + own for m in span.members for t in range(span.first, span.stop)}
        assert sum(len(s.members) * (s.stop - s.first) for s in shared + own) == len(seen)
        near = {(i, t) for i, n in enumerate(lengths) for t in range(n) if window is None or t >= n - window}
        assert seen == near | {(i, t) for i, n in enumerate(lengths) for t in range(min(n, num_global))}
        assert bool(shared) == (window is None)


@pytest.mark.parametrize("programs", [1, 3, 50])
def test_any_division_gives_the_same(programs, monkeypatch):
    case = Case(LENGTHS)
    generation = triton_form.generation_of(DEVICE)
    few = {generation: replace(GENERATIONS[generation], multiprocessors=programs)}
    monkeypatch.setattr(triton_form, "GENERATIONS", few)
    monkeypatch.setattr(triton_form, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    triton_form._plan.cache_clear()
    with record() as launches:
        check(run(case, "triton"), case.exact(0.3), run(case, "reference"))
    triton_form._plan.cache_clear()
    assert launches[0].grid[0] <= programs


@pytest.mark.parametrize("lengths", [[32768], [4096] * 8, [200] * 64, [20000, *[100] * 31]], ids=str)
def test_a_long_context_keeps_every_multiprocessor_busy(lengths):
    q = torch.zeros(len(lengths), 32, 128, dtype=torch.float16)
    cache = torch.zeros(1, 16, 8, 128, dtype=torch.float16).expand(2048, -1, -1, -1)
    tables = torch.zeros(len(lengths), 2048, dtype=torch.int64)
    with record(run=False, generation=90) as launches:
        decode_attention(q, cache, cache, lengths, tables, scale=0.1, impl="triton")
    assert launches[0].grid == (2 * GENERATIONS[90].multiprocessors,)
    bounds, pieces = (launches[0].arguments[name].numpy() for name in ("bounds_ptr", "pieces_ptr"))
    tokens = np.add.reduceat(pieces[:, 5] - pieces[:, 4], bounds[:-1])
    assert tokens.sum() == 8 * sum(lengths)
    # Even but for tiles that the ends of sequences leave partly empty.
    assert tokens.max() <= 64 * -(-8 * sum(-(-n // 64) for n in lengths) // 264)


def test_chunks_of_sequences_do_not_matter(monkeypatch):
    case, options = Case(LENGTHS), SETTINGS["Lambda"]
    monkeypatch.setattr(torch_form, "CHUNK", 1)
    check(run(case, "torch", **options), case.exact(0.3, **options), run(case, "reference", **options))


def test_tensors_may_lie_anywhere():
    case = Case(LENGTHS, dtype=torch.float16)
    expected = run(case, "triton")
    wide = torch.full((len(LENGTHS), 9, 40), torch.nan, dtype=torch.float16, device=DEVICE)
    q = wide[:, 2:8, 3:27]
    q.copy_(case.q)
    k_cache, v_cache = (t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in (case.k_cache, case.v_cache))
    got = decode_attention(q, k_cache, v_cache, case.lengths, case.tables, scale=0.3, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="takes memory that is not there on a GPU")
def test_offsets_beyond_two_to_the_31():
    """Memory that is never touched costs nothing, so strides are large without anything being allocated."""
    case = Case([9, 21], dtype=torch.float16)
    expected = run(case, "triton")
    far = 2**29 + 48
    memory = torch.empty_strided((14 * far,), (1,), dtype=torch.float16)
    shape = case.k_cache.shape
    k_cache, v_cache = (memory.as_strided(shape, (far, 64, 32, 1), start) for start in (0, 2048))
    k_cache.copy_(case.k_cache)
    v_cache.copy_(case.v_cache)
    assert case.tables.max() * far > 2**31
    got = decode_attention(case.q, k_cache, v_cache, case.lengths, case.tables, scale=0.3, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


FAULTS = {
    "scale off by 2%": ('input_precision="ieee") * scale', 'input_precision="ieee") * scale * 1.02'),
    "a head with the keys of another": ("k_ptr + head.to", "k_ptr + (1 - head).to"),
    "last columns dropped": ("exists[:, None] & (ds < SIZE)", "exists[:, None] & (ds < SIZE - 1)"),
    "a last token left out": ("(ns < stop)", "(ns < stop - 1)"),
}


@pytest.mark.parametrize(("before", "after"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(before, after, monkeypatch):
    case = Case([5, 60], dtype=torch.float16)
    check(run(case, "triton"), case.exact(0.3), run(case, "reference"))

    def change(source):
        assert before in source
        return source.replace(before, after)

    monkeypatch.setattr(triton_form.kernels, "_attend", mutated(kernels._attend, change))
    with pytest.raises(AssertionError):
        check(run(case, "triton"), case.exact(0.3), run(case, "reference"))


def test_what_does_not_fit_is_refused():
    case = Case([5, 9])
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(case.q[..., :8], case.k_cache, case.v_cache, [5, 9], case.tables, scale=1.0)
    with pytest.raises(ValueError, match="longer than one"):
        run(case, "torch", prefixes=[SharedPrefix((0, 1), 6)])
    with pytest.raises(ValueError, match="one shared prefix"):
        run(case, "torch", prefixes=[SharedPrefix((0, 1), 4), SharedPrefix((1,), 4)])
