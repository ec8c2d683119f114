"""The benchmark of kernels on a GPU, without one: its arithmetic, its checks in the interpreter, and what it refuses.

Bytes and milliseconds of whole steps are those that were computed by hand for Llama-2-7B at 4.3 TB/s.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import attention, decode, lora, weights
from benchmarks.gpu.case import Case, Ceilings, Op, Work
from benchmarks.gpu.clock import ceilings
from benchmarks.gpu.report import Bench, step_text, table
from benchmarks.gpu.shapes import SHAPES, Shape, Step
from tests.kernels.harness import DEVICE, INTERPRETED

LIMITS = Ceilings(4.3e12, 790e12)
TINY = Shape("tiny", hidden=32, layers=2, heads=2, kv_heads=1, size=16, inner=40)
SMALL = {"prompt": 16, "batch": 4}
OPS = [lora.GROUPED, lora.BACKWARD, attention.PREFILL, attention.TRAINING, decode.DECODE, decode.MERGE]
OPS += [decode.QUANTIZE, weights.DELTA, weights.MERGED]
CASES = [
    *lora.cases(TINY, **SMALL)[3:7],
    lora.cases(TINY, **SMALL)[-1],
    *lora.step_cases(TINY, batch=2)[2:],
    *attention.cases(TINY, prompt=16),
    *decode.cases(TINY, batch=4, context=32, alone=2**12),
    *weights.cases(TINY, **SMALL),
    *weights.merge_cases(elements=1500),
]
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the benchmark itself")


class FakeClock:
    """Takes a millisecond for everything, and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def seconds(self, run, *, graph, cold):
        run()
        self.asked.append((graph, cold))
        return 1e-3


def bench(clock=None, **options) -> Bench:
    return Bench(DEVICE, torch.float16, clock or FakeClock(), LIMITS, **options)


def test_bytes_and_milliseconds_of_a_decode_step():
    shape = SHAPES["7B"]
    assert round(shape.adapter_bytes(16) / 1e6, 2) == 79.95
    step = Step.of(shape, 4.3e12, sequences=64, context=512, rank=16)
    found = [round(1e3 * seconds, 2) for seconds in (step.weights, step.kv, step.adapters, step.total)]
    assert found == [3.07, 4.00, 1.19, 8.26]
    assert round(1e3 * Step.of(shape, 4.3e12, sequences=64, context=512, rank=64).adapters, 2) == 4.76


def test_the_step_is_made_of_all_linears():
    cases = lora.step_cases(SHAPES["7B"])
    assert [case.sizes.layers for case in cases] == [32] * 4
    activations = sum(32 * 64 * (case.sizes.width + 2 * sum(case.sizes.widths)) * 2 for case in cases)
    read = sum(case.op.work(case.sizes, 2).bytes for case in cases)
    assert read - activations == 64 * SHAPES["7B"].adapter_bytes(16)


def test_floors():
    assert Work(43, 0).seconds(Ceilings(43, 1)) == 1
    assert Work(43, 20).seconds(Ceilings(43, 10)) == 2
    # 64 tokens of 64 adapters of rank 16 on 4096 x 4096: 8.39 MB of A and as many of B.
    sizes = lora.Sizes(4096, (4096,), (1,) * 64, (16,) * 64)
    assert lora.work(sizes, 2).bytes == 2 * 8388608 + 64 * 3 * 4096 * 2
    # Causal attention sees half of all pairs and the diagonal; four operations per pair and feature.
    causal = attention.Sizes(2, 100, 100, 4, 2, 16)
    assert attention.prefill_work(causal, 2).operations == 4 * 2 * 5050 * 4 * 16
    window = replace(causal, queries=10, window=7)
    assert attention.prefill_work(window, 2).operations == 4 * 2 * 70 * 4 * 16
    sizes = attention.Sizes(64, 1, 8192, 64, 8, 128)
    assert decode.decode_work(sizes, 2).bytes == 64 * 8192 * 2 * 8 * 128 * 2 + 2 * 64 * 64 * 128 * 2
    half = replace(sizes, shared=4096)
    assert decode.decode_work(half, 2).bytes == (4096 + 64 * 4096) * 2 * 8 * 128 * 2 + 2 * 64 * 64 * 128 * 2
    deltas = weights.Linear(4096, 4096, (1,) * 8, mask=False)
    assert weights.linear_work(deltas, 2).bytes == 8 * 2**21 + 8 * 3 * 4096 * 2
    assert weights.merge_work(weights.Merge(1000, "ties"), 2).bytes == 5 * 1000 * 4


def test_everything_that_is_measured_has_a_name_of_its_own():
    cases = command.list_cases(list(SHAPES.values()))
    assert len({(case.op.name, case.name) for case in cases}) == len(cases) > 50
    alone = [case.sizes for case in cases if case.op is decode.DECODE and case.sizes.sequences == 1]
    assert [sizes.length for sizes in alone] == [32768, 131072]
    assert all(decode.decode_work(sizes, 2).bytes > 256 * 2**20 for sizes in alone)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_operations_are_checked_against_float64(op):
    op.check(DEVICE, torch.float16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op.name}, {case.name}")
def test_what_does_the_same_gives_the_same(case):
    checked = bench()
    checked._wrong[id(case.op)] = ""
    row = checked.run(case)
    assert row.wrong == ""
    assert row.ours == 1e-3
    assert set(row.others.values()) <= {1e-3}
    assert 0 < row.share < 1


def broken(op: Op) -> Op:
    """Return an operation whose results are 2% too large."""

    def bind(tensors, sizes, impl):
        run = op.bind(tensors, sizes, impl)
        return run if impl != "triton" else lambda: [t * 1.02 for t in run()]

    return replace(op, bind=bind)


@pytest.mark.parametrize("op", OPS[::3] + OPS[-1:], ids=lambda op: op.name)
def test_nothing_is_timed_of_an_operation_that_is_wrong(op):
    case = next(case for case in CASES if case.op is op)
    clock = FakeClock()
    row = bench(clock).run(replace(case, op=broken(op)))
    assert row.ours is None
    assert "Error" in row.wrong
    assert clock.asked == []
    text = table([row])
    assert "RED" in text
    assert "1000.0" not in text


def test_a_form_that_differs_at_the_sizes_that_matter_is_wrong():
    (case,) = (c for c in CASES if c.op is decode.MERGE)
    other = replace(
        case.op, others=lambda t, s: {"eager": lambda: [x * 1.1 for x in case.op.bind(t, s, "reference")()]}
    )
    row = bench().run(replace(case, op=other))
    assert row.wrong == "AssertionError: the results of two forms differ"


def test_what_torch_refuses_is_said_and_not_red():
    def refuse():
        raise RuntimeError("no such kernel\nand more")

    (case,) = (c for c in CASES if c.op is decode.MERGE)
    row = bench().run(replace(case, op=replace(case.op, others=lambda *_: {"flex": refuse})))
    assert row.others == {"flex": "RuntimeError: no such kernel"}
    assert row.ours == 1e-3
    assert "| no |" in table([row])


def test_nothing_is_begun_when_time_is_up():
    row = bench(until=10, now=lambda: 11.0).run(CASES[0])
    assert row.wrong == "not run: out of time"


def test_tables_and_the_step():
    clock = FakeClock()
    measured = bench(clock)
    rows = [measured.run(case) for case in lora.step_cases(TINY, batch=2)]
    assert {(graph, cold) for graph, cold in clock.asked} == {(True, False)}
    lines = table(rows).splitlines()
    assert lines[0] == "| grouped_lora | us | floor us | of floor | aim |"
    assert lines[2].startswith("| tiny step, q k v | 1000.0 | 0.0 | 0% |")
    text = step_text(SHAPES["7B"], rows, LIMITS, batch=64, context=512, goal=2e-3)
    assert "at least 8.26 ms (weights 3.07 + KV 4.00 + adapters 1.19)" in text
    assert text.endswith("the adapters took 4.00 ms (30% of bandwidth), aim 2.0 ms")
    assert step_text(SHAPES["7B"], [], LIMITS, batch=64, context=512, goal=2e-3).endswith("were not measured")


def test_ceilings():
    found = ceilings(FakeClock(), DEVICE, size=1000, width=10)
    assert found == Ceilings(2000 / 1e-3, 2000 / 1e-3)


def test_results_are_saved(tmp_path):
    rows = [bench().run(Case(decode.MERGE, "a", attention.SMALL))]
    command.save(tmp_path / "gpu.json", {"gpu": "none"}, LIMITS, rows)
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["ceilings"] == {"bandwidth": 4.3e12, "rate": 790e12}
    assert saved["rows"][0]["ours"] == 1e-3
    assert saved["rows"][0]["share"] == rows[0].share


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert command.main([]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert "finds none here" in found.err
