"""Fine-tunes of a bit per weight: every row gets the change of its own, from bits that are read once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.harness import (
    DEVICE,
    DOT_DTYPES,
    INTERPRETED,
    check_resources,
    compile_in_process,
    count_traffic,
    mutated,
)
from tests.oracles import check_stick
from toolkit.checkpoints.compressed import pack_bits
from toolkit.kernels.delta_linear import BitDeltas, delta_linear, triton_form
from toolkit.kernels.delta_linear import triton as kernels
from toolkit.kernels.launch import GENERATIONS, record
from toolkit.serving.adapters import tuned
from toolkit.serving.changes import BitChange, Rebuilt

pytestmark = [pytest.mark.usefixtures("nan_outputs")]
IMPLS = pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
TASKS = [0, -1, 1, 1, 3, 0, 0, -1, 3, 1, -1]
"""Fine-tune of each row: several rows that lie apart, two side by side, none; nobody has fine-tune 2."""


class Case:
    """Fine-tunes whose bits are packed by numpy, and a batch."""

    def __init__(self, tasks=TASKS, dtype=torch.float32, *, mask=True, per_output=True, shape=(53, 37), vector=None):
        rng = np.random.default_rng(0)
        torch.manual_seed(0)
        self.tasks, (n, k), count = list(tasks), shape, 4
        self.whole = rng.integers(0, 2, (count, n, k)).astype(bool)
        bits = torch.from_numpy(np.packbits(self.whole, axis=2, bitorder="little")).to(DEVICE)
        if k % 8:
            bits[:, :, -1] |= 255 << k % 8 & 255  # what fills a byte may be anything
        scale = torch.rand(count, n if per_output else 1, device=DEVICE) + 0.5
        drawn = torch.randn(n, k).to(DEVICE, vector or dtype)
        self.deltas = BitDeltas(bits, scale, drawn if mask else None)
        self.x = torch.randn(len(self.tasks), k).to(DEVICE, dtype)
        self.y = torch.randn(len(self.tasks), n).to(DEVICE, dtype) * k**0.5

    def run(self, impl="triton"):
        y = self.y.clone()
        delta_linear(y, self.x, self.tasks, self.deltas, impl=impl)
        return y

    def exact(self, dtype=torch.float64):
        """Each row with its whole change, by numpy's bits."""
        y = self.y.to(dtype)
        for row, task in enumerate(self.tasks):
            if task >= 0:
                bits, vector = torch.from_numpy(self.whole[task]).to(DEVICE), self.deltas.vector_NK
                change = bits.to(dtype) * 2 - 1 if vector is None else torch.where(bits, vector.to(dtype), 0)
                y[row] += self.deltas.scale_SN[task].to(dtype) * (change @ self.x[row].to(dtype))
        return y

    def check(self, got, slack=1.0):
        check_stick(got, self.exact(), self.exact(self.y.dtype), slack=slack)


@IMPLS
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("mask", [True, False], ids=["masks", "signs"])
@pytest.mark.parametrize("per_output", [True, False])
def test_rows_of_several_fine_tunes(impl, dtype, mask, per_output):
    case = Case(dtype=dtype, mask=mask, per_output=per_output)
    case.check(case.run(impl))


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_bfloat16(impl, mask):
    for tasks in (TASKS, [*[1] * 20, -1, *[0] * 16]):
        case = Case(tasks, torch.bfloat16, mask=mask)
        case.check(case.run(impl))


@IMPLS
@pytest.mark.parametrize("shape", [(1, 1), (7, 8), (130, 9), (3, 300)], ids=str)
def test_odd_shapes(impl, shape):
    for mask in (True, False):
        case = Case([2, -1, 2, 0], shape=shape, mask=mask)
        case.check(case.run(impl), slack=2)


@pytest.mark.parametrize("tasks", [TASKS, [1] * 70 + [-1] + [0] * 35, [3] * 17], ids=["few", "many", "one more"])
def test_tiles_of_any_size(tasks, monkeypatch):
    case = Case(tasks, torch.float16)
    for generation in GENERATIONS:
        monkeypatch.setattr(triton_form, "generation_of", lambda _, own=generation: own)
        case.check(case.run())
    # Without further programs there are no parts, and outputs are added to at once.
    monkeypatch.setattr(triton_form, "PROGRAMS_PER_MULTIPROCESSOR", 0.001)
    with record() as launches:
        case.check(case.run())
    assert [one.name for one in launches] == ["_multiply"]


@pytest.mark.parametrize("vector", [torch.float32, torch.float16, torch.bfloat16])
def test_a_vector_of_another_type(vector):
    case = Case(vector=vector)
    for impl in ("triton", "torch"):
        case.check(case.run(impl))


@IMPLS
def test_rows_without_a_fine_tune_stay_bit_for_bit(impl):
    case = Case()
    # A negative zero plus zero would be a positive one.
    case.y[1] = -0.0
    kept = [row for row, task in enumerate(TASKS) if task < 0]
    assert torch.equal(case.run(impl)[kept].view(torch.int32), case.y[kept].view(torch.int32))


@pytest.mark.parametrize("tasks", [[], [-1], [-1] * 3])
@IMPLS
def test_nothing_to_do(impl, tasks):
    case = Case(tasks)
    with record() as launches:
        got = case.run(impl)
    assert torch.equal(got, case.y)
    assert not launches


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_tensors_may_lie_anywhere(impl):
    case = Case(dtype=torch.float16)
    expected = case.run(impl)
    wide = torch.full((len(TASKS), 3, 60), torch.nan, dtype=torch.float16, device=DEVICE)
    x, y = wide[:, 0, 5:42], wide[:, 1, :53]
    x.copy_(case.x)
    y.copy_(case.y)
    nans, vector = wide.isnan().sum(), torch.full((53, 40), torch.nan, dtype=torch.float16, device=DEVICE)
    vector[:, 1:38] = case.deltas.vector_NK
    deltas = BitDeltas(case.deltas.bits_SNB, case.deltas.scale_SN, vector[:, 1:38])
    delta_linear(y, x, TASKS, deltas, impl=impl)
    assert torch.equal(y, expected)
    assert wide.isnan().sum() == nans


@pytest.mark.skipif(not INTERPRETED, reason="takes memory that is not there on a GPU")
def test_offsets_beyond_two_to_the_31():
    """Memory that is never touched costs nothing, so rows lie far apart without being allocated."""
    case = Case([0, 1, 1, 3], torch.float16)
    expected, far = case.run(), 2**31 + 48
    memory = torch.empty_strided((4 * far,), (1,), dtype=torch.float16)
    x, y = memory.as_strided((4, 37), (far, 1)), memory.as_strided((4, 53), (far, 1), 100)
    vector = memory.as_strided((53, 37), (2**27, 1), 400)
    vector.copy_(case.deltas.vector_NK)
    x.copy_(case.x)
    y.copy_(case.y)
    delta_linear(y, x, case.tasks, BitDeltas(case.deltas.bits_SNB, case.deltas.scale_SN, vector), impl="triton")
    assert torch.equal(y, expected)


@pytest.mark.parametrize("width", [40, 37], ids=["whole bytes", "rows that begin inside bytes"])
def test_bits_as_checkpoints_store_them(width):
    case = Case([1, 1], shape=(53, width), per_output=False)
    stored = torch.from_numpy(pack_bits(case.whole[1].ravel())).to(DEVICE)
    given = BitDeltas.of_one(stored, (53, width), case.deltas.scale_SN[1], case.deltas.vector_NK)
    y = case.y.clone()
    delta_linear(y, case.x, [0, 0], given)
    case.check(y)
    parts = 53 * -(-width // 8), 4, 4 * 53 * width
    assert given.nbytes == sum(parts)
    assert width % 8 or given.bits_SNB.data_ptr() == stored.data_ptr()


@pytest.mark.skipif(not INTERPRETED, reason="loads are counted in the interpreter")
@pytest.mark.parametrize("mask", [True, False], ids=["masks", "signs"])
def test_bits_are_read_once_with_enough_programs(mask):
    case = Case([0, 1, 2, 3, 3, -1, 0], torch.float16, shape=(512, 2048), mask=mask, per_output=False)
    counted = [case.deltas.bits_SNB, case.y.clone(), *([case.deltas.vector_NK] if mask else [])]
    with record() as launches, count_traffic(*counted) as (bits, out, *vector):
        delta_linear(counted[1], case.x, case.tasks, case.deltas, impl="triton")
    assert bits.loaded == case.deltas.bits_SNB.nbytes
    # Once per fine-tune; programs of all of them run side by side, so it comes from the second-level cache.
    assert [v.loaded for v in vector] == [4 * v.nbytes for v in counted[2:]]
    assert out.loaded == out.stored == 6 * 512 * 2
    assert np.prod(launches[0].grid) >= 2 * GENERATIONS[90].multiprocessors
    assert launches[0].grid[0] == 4


FAULTS = {
    "scale off by 2%": ("+ total * scale", "+ 1.02 * total * scale"),
    "last columns dropped": ("ns < outputs", "ns < outputs - 1"),
    "a last feature left out": ("(k + ks < width)", "(k + ks < width - 1)"),
    "the bits of a byte the wrong way round": (">> tl.arange(0, 8)", ">> (7 - tl.arange(0, 8))"),
    "a fine-tune with the bits of another": ("bits_ptr += task", "bits_ptr += (task ^ 1)"),
    "a part left out": ("for part in range(parts)", "for part in range(1, parts)"),
}


@pytest.mark.parametrize(("before", "after"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(before, after, monkeypatch):
    case = Case(dtype=torch.float16, shape=(53, 300))
    case.check(case.run())

    def change(source):
        assert before in source
        return source.replace(before, after)

    for name in ("_multiply", "_add"):
        monkeypatch.setattr(kernels, name, mutated(getattr(kernels, name), change))
    with pytest.raises(AssertionError):
        case.check(case.run())


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_one_row_with_the_fine_tune_of_another_is_caught(impl):
    case = Case(dtype=torch.float16)
    got = case.run(impl)
    case.tasks[5] = 1
    with pytest.raises(AssertionError):
        case.check(got)


def test_what_does_not_fit_is_refused():
    case = Case()
    bits, scale, vector = case.deltas.bits_SNB, case.deltas.scale_SN, case.deltas.vector_NK
    for tasks in ([-2, *TASKS[1:]], [4, *TASKS[1:]]):
        with pytest.raises(ValueError, match="there are 4, and -1 is none"):
            delta_linear(case.y, case.x, tasks, case.deltas)
    for y, deltas, message in (
        (case.y[:, 1:], case.deltas, "do not fit bits"),
        (case.y.half(), case.deltas, "different types"),
        (case.y, BitDeltas(bits, scale[:, :2], vector), "scales"),
        (case.y, BitDeltas(bits, scale, vector[:, 1:]), "a vector"),
        (case.y, BitDeltas(bits, scale, vector.T.contiguous().T), "next to each other"),
    ):
        with pytest.raises(ValueError, match=message):
            delta_linear(y, case.x, TASKS, deltas)


CASES = ["masks_in_decode", "masks_in_prefill", "signs_in_decode", "signs_in_prefill"]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles(generation):
    found = compile_in_process(CASES[1:3], generation)
    check_resources(found, GENERATIONS[generation].shared_memory)
    assert {kernel["kernel"] for kernel in found} == set(triton_form.TABLE.kernels(generation))
    # Bits are loaded two bytes at a time, with masks as with signs; inputs and the vector sixteen.
    assert max(kernel["narrow"] for kernel in found) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_whole_table_compiles(generation):
    cases = [*CASES, "masks_in_decode_float32", "masks_in_prefill_float32"]
    check_resources(compile_in_process(cases, generation, whole_table=True), GENERATIONS[generation].shared_memory)


@pytest.mark.parametrize("parts", ["mask", "signs"])
def test_the_engine_adds_bits_to_a_linear_as_it_would_rebuild_it(parts):
    linear = torch.nn.Linear(40, 24)
    rng = torch.Generator().manual_seed(0)
    kept = {parts: torch.randint(0, 256, (24 * 5,), dtype=torch.uint8, generator=rng)}
    kept |= {"vector": torch.randn(24, 40)} if parts == "mask" else {"scale": torch.rand(24)}
    recipes = {"weight": tuned._Rebuild(kept)}
    change, x = tuned._bit_change(linear, recipes), torch.randn(1, 7, 40)
    assert change is not None
    y = linear(x)
    before, got = y.clone(), change.outputs(linear, x, y)
    assert torch.equal(y, before)
    torch.testing.assert_close(got, Rebuilt(recipes).outputs(linear, x, y), rtol=1e-5, atol=1e-5)
    assert change.nbytes < linear.weight.nbytes / 8 + 4 * 24 + 4 + kept.get("vector", y[:0]).nbytes


def test_the_engine_rebuilds_what_is_no_linear_of_bits():
    bits = tuned._Rebuild({"signs": torch.zeros(8, dtype=torch.uint8), "scale": torch.ones(1)})
    assert tuned._bit_change(torch.nn.Embedding(8, 8), {"weight": bits}) is None
    assert tuned._bit_change(torch.nn.Linear(8, 8), {"weight": bits, "bias": bits}) is None
    assert tuned._bit_change(torch.nn.Linear(8, 8), {"weight": tuned._Rebuild({"change": torch.zeros(8, 8)})}) is None


def test_a_shared_vector_is_on_a_device_once():
    bits, vector, device = torch.zeros(8, dtype=torch.uint8), torch.randn(4, 16), torch.device("meta")
    changes = [BitChange(BitDeltas.of_one(bits, (4, 16), None, vector)) for _ in range(2)]
    first, second = (change.to(device).deltas.vector_NK for change in changes)
    assert first is second
    assert first.device == device
    assert changes[0].to(vector.device).deltas.vector_NK is vector
