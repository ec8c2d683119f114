"""Merging on a device, by way of torch on the CPU: the arrays against numpy, and merges against those without a device.

Oracles are numpy itself and the merge on the CPU, whose own tests compare it with closed forms. What a GPU adds, that
copies do not wait for each other, is not seen here.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.numpy import save_file

from tests import tiny
from tests.merge.laws import Arrays, Example, Measured, run, settings, statistics_of
from tests.merge.test_laws import NAMES, SHAPES, example, models, write_rows
from toolkit.checkpoints import deltas
from toolkit.checkpoints.dtypes import DTYPES, all_finite, decode, encode
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.cli import main
from toolkit.errors import CheckpointError, SpecError, UnsupportedError
from toolkit.merge import device
from toolkit.merge import plan as plans
from toolkit.merge.device import feeds, stream
from toolkit.merge.device.array import DeviceArray
from toolkit.merge.device.functions import to_host
from toolkit.merge.device.stream import DeviceScratch, _Rounded
from toolkit.merge.method import load_method
from toolkit.merge.plan import make_plan
from toolkit.merge.random import Draws
from toolkit.merge.run import merge
from toolkit.merge.verify import verify

ON_DEVICE = [name for name in NAMES if load_method(name).on_device]
EXACT = {
    *(
        "breadcrumbs",
        "breadcrumbs_ties",
        "consensus",
        "linear",
        "nearswap",
        "passthrough",
        "ram",
        "ramplus_tl",
        "task_arithmetic",
        "ties",
    ),
}
"""Methods in which nothing is rounded but element by element; the others have sums in their factors."""


def up(x: np.ndarray) -> DeviceArray:
    """Copy an array to the device."""
    held = x.view(x.dtype.str.replace("u", "i")) if x.dtype in (np.uint32, np.uint64) else x
    return DeviceArray(torch.from_numpy(held.copy()), x.dtype)


def same(got: Any, expected: Any) -> None:
    """Compare bits, but for those of NaN."""
    expected = np.asarray(expected)
    assert got.dtype == expected.dtype
    got = to_host(got)
    assert got.shape == expected.shape
    if expected.dtype.kind == "f":
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        np.testing.assert_array_equal(np.signbit(got)[~np.isnan(got)], np.signbit(expected)[~np.isnan(got)])
    np.testing.assert_array_equal(got, expected)


FLOATS = arrays_of.arrays(np.float32, (3, 5), elements=st.floats(width=32))
WORDS = arrays_of.arrays(np.uint32, (3, 5), elements=st.integers(0, 2**32 - 1) | st.sampled_from([0, 2**31, 2**32 - 1]))


def quiet() -> np.errstate:
    return np.errstate(all="ignore")


class TestArray:
    """Numpy's own answer is the oracle."""

    @given(FLOATS, FLOATS)
    def test_floats(self, a, b):
        with quiet():
            for function in (np.add, np.subtract, np.multiply, np.divide):
                same(function(up(a), up(b)), function(a, b))
                same(function(up(a), b[0]), function(a, b[0]))  # an array of the host
                same(function(up(a), np.float32(b[0, 0])), function(a, np.float32(b[0, 0])))
                same(function(3, up(a)), function(3, a))
            for function in (np.abs, np.sign, np.negative, np.square, np.isnan, np.isfinite):
                same(function(up(a)), function(a))
            for function in (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal):
                same(function(up(a), up(b)), function(a, b))
            for function in (np.maximum, np.minimum):  # which of 0 and -0 is larger is not said
                same(function(up(a), up(b)) + 0, function(a, b) + 0)
            same(up(a).sum(axis=0), a.sum(axis=0))
            for reduce in ("max", "min"):
                same(getattr(up(a), reduce)(axis=0) + 0, getattr(a, reduce)(axis=0) + 0)
                same(getattr(up(a), reduce)(axis=1, keepdims=True) + 0, getattr(a, reduce)(axis=1, keepdims=True) + 0)

    @given(WORDS, WORDS, st.integers(0, 31))
    def test_words_wrap_and_order_without_sign(self, a, b, by):
        scalar = np.uint32(b[0, 0])
        with quiet():
            for function in (np.add, np.subtract, np.multiply, np.bitwise_and, np.bitwise_or, np.bitwise_xor):
                same(function(up(a), up(b)), function(a, b))
                same(function(up(a), scalar), function(a, scalar))
            same(~up(a), ~a)
            for function in (np.left_shift, np.right_shift):
                same(function(up(a), np.uint32(by)), function(a, np.uint32(by)))
            for function in (np.less, np.less_equal, np.greater, np.greater_equal, np.maximum, np.minimum, np.equal):
                same(function(up(a), up(b)), function(a, b))
                same(function(up(a), scalar), function(a, scalar))
                same(function(up(a), int(scalar)), function(a, int(scalar)))
            same(np.sort(up(a), axis=1), np.sort(a, axis=1))
            same(up(a).max(axis=0), a.max(axis=0))
            assert int(up(a)[1, 2]) == a[1, 2]

    @given(WORDS)
    def test_casts_and_views(self, a):
        for dtype in (np.float32, np.float64, np.int64, np.uint64, np.int32, np.uint8, np.bool_):
            same(up(a).astype(dtype), a.astype(dtype))
        same(up(a).view(np.float32), a.view(np.float32))
        same(up(a).view(np.int32).astype(np.uint32), a)
        small = (a >> np.uint32(2)).astype(np.float64) - 1e9
        same(up(small).astype(np.int64), small.astype(np.int64))
        keys = a.astype(np.uint64) << np.uint64(32)
        same(np.sort(up(keys)), np.sort(keys))

    @given(FLOATS)
    def test_results_are_written_where_they_are_wanted(self, a):
        results: list[Any] = []
        with quiet():
            x, y = up(a), a.copy()
            for z in (x, y):
                z0, z1 = z[0], z[1:]
                np.multiply(z0, np.float32(0.3), out=z0)
                np.bitwise_xor(z0.view(np.uint32), np.uint32(1 << 31), out=z0.view(np.uint32))
                np.copyto(z1[:, ::2], np.float32(7), where=z1[:, ::2] > 0)
                z1 += 1
                z.reshape(-1)[2:4].fill(0.5)
            same(x, y)
            for z in (x, y):
                wide = np.zeros(z.shape, np.float64, like=z)
                np.multiply(z.view(np.uint32), 2.0**-32, out=wide, dtype=np.float64)
                np.add(wide, 3, out=wide.view(np.int64), dtype=np.float64, casting="unsafe")
                results.append(wide)
            same(*results)

    @given(WORDS, arrays_of.arrays(np.int64, 7, elements=st.integers(-3, 30)))
    def test_other_functions(self, a, places):
        x, bits = up(a), a.reshape(-1)
        assert np.count_nonzero(x) == np.count_nonzero(a)
        same(np.flatnonzero(x > 5), np.flatnonzero(a > 5))
        same(x[x > 5], a[a > 5])
        same(x[:, np.newaxis, ::2], a[:, np.newaxis, ::2])
        same(np.concatenate([x, x[:1]], axis=0), np.concatenate([a, a[:1]], axis=0))
        same(np.where(x > 5, x, np.uint32(1)), np.where(a > 5, a, np.uint32(1)))
        same(np.take(x, up(places), mode="clip"), np.take(a, places, mode="clip"))
        np.testing.assert_array_equal(
            np.bincount(x.reshape(-1) >> 28, minlength=16), np.bincount(bits >> 28, minlength=16)
        )
        assert int(np.partition(x.reshape(-1), 4)[4]) == np.partition(bits, 4)[4]
        for side in ("left", "right"):
            same(np.searchsorted(np.sort(x.reshape(-1)), x, side), np.searchsorted(np.sort(bits), a, side))
        same(np.packbits(x.reshape(-1) > 5), np.packbits(bits > 5))
        same(np.unpackbits(np.packbits(x.reshape(-1) > 5), count=15), np.unpackbits(np.packbits(bits > 5), count=15))
        same(np.clip(x.astype(np.float64), 2.5, 9e8), np.clip(a.astype(np.float64), 2.5, 9e8))

    def test_sums_in_float64(self):
        a = np.random.default_rng(0).standard_normal((4, 1001)).astype(np.float32)
        wide = a.astype(np.float64)
        np.testing.assert_allclose(float(up(a).sum()), wide.sum(), rtol=1e-12)
        np.testing.assert_allclose(to_host(np.vecdot(up(wide), up(wide))), (wide * wide).sum(-1), rtol=1e-12)
        np.testing.assert_allclose(float(up(wide[0]) @ up(wide[1])), wide[0] @ wide[1], rtol=1e-12)
        np.testing.assert_allclose(np.einsum("rk,rk->r", up(wide), up(wide)), np.square(wide).sum(1), rtol=1e-12)
        assert int((up(a) > 0).sum()) == (a > 0).sum()

    @pytest.mark.parametrize(
        ("what", "use"),
        [
            ("np.tanh", lambda x: np.tanh(x)),
            ("np.cumsum", lambda x: np.cumsum(x)),
            (r"np\.add\.reduce", lambda x: np.add.reduce(x)),
            ("np.divide with where=", lambda x: np.divide(x, x, out=x.copy(), where=x > 0)),
            (r"np\.svd", lambda x: np.linalg.svd(x)),
            ("copying an array to the host", lambda x: np.asarray(x)),
            ("copying an array to the host", lambda x: np.zeros((3, 5)).__setitem__(0, x[0])),
            ("into an array of the host", lambda x: np.add(x, 1, out=np.zeros((3, 5), np.float32))),
            (r"np\.sign of uint32", lambda x: np.sign(x.view(np.uint32))),
            ("array of float16", lambda x: x.astype(np.float16)),
            ("cast of float32 to uint32", lambda x: x.astype(np.uint32)),
        ],
    )
    def test_what_is_not_covered_is_an_error_that_names_it(self, what, use):
        with pytest.raises(UnsupportedError, match=f"{what}.* does not run on a device"):
            use(up(np.ones((3, 5), np.float32)))

    def test_an_output_that_does_not_fit_is_an_error(self):
        x = up(np.ones((3, 5), np.float32))
        with pytest.raises(ValueError, match=r"shape \(3, 5\) does not fit an output of shape \(5,\)"):
            np.add(x, x, out=x[0])
        with pytest.raises(TypeError, match="gives float32, which cannot be written as int64"):
            np.add(x, x, out=np.zeros((3, 5), np.int64, like=x))


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (65_000, 140_000), (65_536, 131_072)])
def test_random_numbers_are_those_of_the_host(start, stop):
    draws = Draws(3, "a.weight", 1)
    like = up(np.zeros(stop - start, np.uint32))
    same(draws.bits(start, stop, like), draws.bits(start, stop))
    for probability in (0.0, 0.3, 0.7, 1.0):
        same(draws.below(probability, start, stop, like), draws.below(probability, start, stop))


class DeviceArrays(Arrays):
    """A tensor of several models in memory, whose slices are on the device."""

    def stacked(self, every: int = 1, begin: int = 0):
        for start, x in super().stacked(every, begin):
            yield start, up(x)


class DeviceMeasured(Measured):
    """Statistics in memory, read to the device."""

    def read(self, start, stop):
        return up(super().read(start, stop))


def run_on_device(method: str, x: np.ndarray, **params: Any) -> np.ndarray:
    """Merge as `laws.run` does, with every slice and every statistic on the device."""
    loaded, given = load_method(method), settings(method, params, len(x))
    tensor = DeviceArrays(x, loaded.scope)
    tensor.statistics = DeviceMeasured(statistics_of("fisher", tensor.x).values) if loaded.statistics else None
    if loaded.survey:
        tensor.surveyed = loaded.survey([(tensor, given)])[0]
    state = loaded.prepare(tensor, given) if loaded.prepare else None
    width = x.shape[-1] if x.ndim > 1 else 1
    parts: list[np.ndarray] = []
    for start, chunk in tensor.stacked():
        shaped = chunk.reshape(len(x), -1, width) if loaded.scope == "row" else chunk
        parts.append(to_host(loaded.combine(shaped, given, state, start)).reshape(-1))
    return np.concatenate(parts).reshape(x.shape[1:])


def compare(exact: bool, got: np.ndarray, expected: np.ndarray) -> None:
    """Compare values (-0 is 0) where every step is exact, and else to what the last bits of a sum may do."""
    if exact:
        np.testing.assert_array_equal(got, expected)
    else:
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * float(np.abs(expected).max(initial=1e-30)))


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"preset": "paper", "density": (0.3,)}),
    ("ties", {"vote": "frequency", "zero_vote": "majority", "trim": "tensor", "density": (0.3,)}),
    ("consensus", {"aggregate": "ties"}),
    ("breadcrumbs", {"density": (0.5,), "gamma": (0.1,)}),
    ("sce", {"select_topk": 0.2}),
    ("dare_ties", {"preset": "paper", "density": (0.5,)}),
    ("dare_linear", {"rescale": False, "density": (0.5,)}),
    ("della", {"preset": "paper", "density": (0.5,)}),
    ("della_linear", {"rescale": False, "density": (0.5,)}),
    ("model_stock", {"filter_wise": True}),
    ("nuslerp", {"weight": (0.6, 0.4), "nuslerp_flatten": False}),
    ("nuslerp", {"weight": (0.6, 0.4), "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("fisher", {"normalize": True, "floor": 1e-3}),
]
"""Ways through methods that their examples do not take."""


@pytest.mark.parametrize("method", ON_DEVICE)
class TestMethods:
    @pytest.mark.parametrize("shape", [*SHAPES, (300, 400)], ids=str)
    def test_equals_the_merge_on_the_cpu(self, method, shape):
        x = models(method, shape)
        compare(
            method in EXACT,
            run_on_device(method, x, **example(method).params),
            run(method, x, **example(method).params),
        )

    def test_values_on_a_grid(self, method):
        # As the deltas of bfloat16 models are: ties of magnitude, zeros, zeros of either sign.
        x = np.round(models(method, (40, 50)) * 4) / 4
        compare(
            method in EXACT,
            run_on_device(method, x, **example(method).params),
            run(method, x, **example(method).params),
        )


@pytest.mark.parametrize(("method", "params"), VARIANTS, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_other_ways_through_methods(method, params):
    exact = params.get("preset") == "paper" or not params.get("rescale", True)  # no rescaling by a norm
    for shape in ((300, 400), (77,)):
        x = models(method, shape)
        compare(method in EXACT or exact, run_on_device(method, x, **params), run(method, x, **params))


def test_nan_and_infinity_stay_where_they_are():
    x = models("ties", (300,))
    x[0, 3], x[1, 7], x[2, 9] = np.nan, np.inf, -np.inf
    with quiet():
        for method in ("linear", "ties", "dare_ties"):
            got, expected = (f(method, x, **example(method).params) for f in (run_on_device, run))
            np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
            np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, list[Path]]:
    """For each dtype a base, three fine-tunes of it and a LoRA."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        root = tmp_path_factory.mktemp("family")
        base = tiny.llama(num_hidden_layers=1).to(dtype)
        folders = [tiny.save_model(base, root / "base", max_shard_size="60KB")]
        folders += [tiny.save_model(tiny.tuned(base, i), root / f"tuned{i}") for i in range(3)]
        found[str(dtype).removeprefix("torch.")] = [*folders, tiny.save_lora(folders[0], root / "lora")]
    return found


def spec_of(method: str, inputs: list[Path], base: Path, work: Path, **changes: Any) -> dict[str, Any]:
    found: Example = example(method)
    spec: dict[str, Any] = {"merge_method": method, "base_model": str(base), "parameters": {}}
    spec["models"] = [{"model": str(folder)} for folder in inputs[: found.models]]
    for key, value in found.params.items():
        if key in load_method(method).per_model:
            for model, own in zip(spec["models"], value, strict=True):
                model.setdefault("parameters", {})[key] = own
        else:
            spec["parameters"][key] = value
    if load_method(method).statistics:
        spec["data"] = {"files": [str(write_rows(work / "rows.jsonl"))]}
    return spec | changes


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the values of a checkpoint, float32."""
    found = {}
    with open_checkpoint(folder) as checkpoint:
        for name, info in checkpoint.tensors.items():
            found[name] = np.empty(info.count, np.float32)
            decode(checkpoint.read_raw(name), info.dtype, found[name])
    return found


MERGES = [(method, "bfloat16") for method in ON_DEVICE]
MERGES += [(method, dtype) for method in ("linear", "slerp", "ties", "della") for dtype in ("float16", "float32")]


@pytest.mark.parametrize(("method", "dtype"), MERGES)
def test_whole_merges_equal_those_on_the_cpu(method, dtype, families, tmp_path, monkeypatch):
    # Several slices of several chunks, a LoRA among the inputs, and two workers.
    monkeypatch.setattr(device, "SLICE", 4000)
    monkeypatch.setattr(deltas, "CHUNK", 1000)
    family = families[dtype]
    inputs = [family[1], family[4], family[2]]
    spec = spec_of(method, inputs, family[0], tmp_path)
    if load_method(method).takes == "weights":
        spec["models"] = [
            {**model, "model": str(path)} for model, path in zip(spec["models"], family[1:], strict=False)
        ]
    expected = weights(merge(spec, tmp_path / "cpu", quiet=True).path)
    first = merge(spec, tmp_path / "first", quiet=True, device="torch:cpu", workers=1).path
    got = weights(first)
    assert got.keys() == expected.keys()
    steps = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2e-6}[dtype]
    for name, value in expected.items():
        if method in EXACT:
            np.testing.assert_array_equal(got[name], value)
        else:
            # What differs in the last bit may round to the neighbour, and does so seldom.
            np.testing.assert_allclose(got[name], value, rtol=2 * steps, atol=1e-6)
            assert (got[name] == value).mean() > (0.98 if steps > 1e-5 else 0.5)
    again = merge(spec, tmp_path / "again", quiet=True, device="torch:cpu", workers=2).path
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    if not load_method(method).statistics:
        assert verify(first, quiet=True).numbers["equal"]


FUSED: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"normalize": False}),
    ("task_arithmetic", {"lambda": 0.7}),
    ("ties", {"density": (0.3, 0.5, 0.7), "normalize": True, "lambda": 0.7}),
    ("ties", {"preset": "paper", "density": (0.3,) * 3}),
    ("dare_linear", {"preset": "paper", "density": (0.3, 0.5, 0.7)}),
    ("dare_ties", {"preset": "paper", "density": (0.3, 0.5, 0.7)}),
    ("dare_ties", {"density": (0.3, 0.5, 1.0)}),
]


@pytest.mark.parametrize(("method", "params"), FUSED, ids=str)
def test_kernels_merge_as_numpy_does(method, params, families, tmp_path, monkeypatch):
    """Methods that are one kernel on a GPU, in Triton's interpreter, against whole merges on the CPU."""
    kernels = pytest.importorskip("toolkit.kernels.merge_elementwise.triton_form", reason="needs triton")
    ran: list[Any] = []
    monkeypatch.setattr(kernels, "launch", lambda *given: (ran.append(given), launch(*given))[1])
    launch = importlib.import_module("toolkit.kernels.launch").launch
    monkeypatch.setattr(DeviceScratch, "fuses", True)
    monkeypatch.setattr(device, "SLICE", 12_000)
    monkeypatch.setattr(deltas, "CHUNK", 1000)
    family = families["bfloat16"]
    spec = spec_of(method, [family[1], family[4], family[2]], family[0], tmp_path)
    spec["models"] = [{"model": str(path)} for path in (family[1:4] if method == "linear" else family[2:5])]
    spec["parameters"] = {key: value for key, value in params.items() if not isinstance(value, tuple)}
    for i, model in enumerate(spec["models"]):
        own = {key: value[i] for key, value in params.items() if isinstance(value, tuple)}
        model["parameters"] = own | {"weight": 0.4 + 0.2 * i}
    expected = weights(merge(spec, tmp_path / "cpu", quiet=True).path)
    got = weights(merge(spec, tmp_path / "device", quiet=True, device="torch:cpu", workers=1).path)
    assert ran
    for name, value in expected.items():
        if method.startswith("dare") and "preset" not in params:  # whose factor is a ratio of sums
            np.testing.assert_allclose(got[name], value, rtol=2**-7, atol=1e-6)
            assert (got[name] == value).mean() > 0.98
        else:
            np.testing.assert_array_equal(got[name], value)


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.floating], ids=lambda d: d.name)
def test_formats_are_read_and_written_as_on_the_cpu(dtype, tmp_path):
    rng = np.random.default_rng(0)
    words = np.arange(256, dtype=np.uint8) if dtype.bits == 8 else rng.integers(0, 256, 4096, np.uint8)
    expected = np.empty(len(words) * 8 // dtype.bits, np.float32)
    with quiet():
        decode(words, dtype, expected)
        got = torch.from_numpy(words.copy()).view(getattr(torch, dtype.torch)).to(torch.float32).numpy()
    np.testing.assert_array_equal(got, expected)
    others = np.array([0.0, -0.0, 1e9, -1e9, 3e38, 448.0, 464.0, 465.0, 1e-9, *rng.standard_normal(999)], np.float32)
    values = np.concatenate([expected, others])
    for chosen in (values, values[np.abs(values) < 400]):
        on_device = torch.from_numpy(chosen.copy())
        raw, finite = _Rounded.of(on_device, dtype, DeviceScratch(torch.device("cpu"))).result()
        own = encode(chosen.copy(), dtype)
        assert finite == all_finite(own, dtype)
        back = [np.empty(len(chosen), np.float32) for _ in range(2)]
        with quiet():
            for into, bytes_ in zip(back, (raw, own), strict=True):
                decode(bytes_, dtype, into)
        np.testing.assert_array_equal(back[0], back[1])


def checkpoint_of(folder: Path, seed: int, shape: tuple[int, ...] = (300, 400)) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    save_file({"a.weight": x, "a.bias": x[0].copy()}, folder / "model.safetensors")
    return folder


class TestStream:
    @pytest.fixture
    def inputs(self, tmp_path) -> list[Path]:
        return [checkpoint_of(tmp_path / f"m{i}", i) for i in range(4)]

    @pytest.mark.parametrize("room", [0, 500_000, 1 << 28])
    def test_every_byte_is_read_once_where_there_is_room(self, inputs, tmp_path, monkeypatch, room):
        monkeypatch.setattr(device, "SLICE", 10_000)
        monkeypatch.setattr(deltas, "CHUNK", 2_000)
        monkeypatch.setattr(stream, "_ROOM_ON_CPU", room)
        read: list[int] = []
        whole = feeds.Files.read
        monkeypatch.setattr(
            feeds.Files, "read", lambda self, file, at, into: (read.append(len(into)), whole(self, file, at, into))[1]
        )
        spec = spec_of("slerp", inputs[1:], inputs[0], tmp_path)
        spec["models"] = spec["models"][:1]
        out = merge(spec, tmp_path / "out", quiet=True, device="torch:cpu", workers=1).path
        expected = weights(merge(spec, tmp_path / "cpu", quiet=True).path)
        np.testing.assert_allclose(weights(out)["a.weight"], expected["a.weight"], rtol=1e-6, atol=1e-6)
        once = 2 * (300 * 400 + 400) * 4
        if room > once:
            assert sum(read) == once
        elif room:
            assert once < sum(read) < 2 * once
        else:
            assert sum(read) == 2 * once

    def test_a_pass_that_is_left_early_does_not_disturb_the_next(self, inputs, tmp_path, monkeypatch):
        monkeypatch.setattr(device, "SLICE", 1300)
        monkeypatch.setattr(deltas, "CHUNK", 400)
        with make_plan_of("linear", inputs, tmp_path) as plan:
            tensor = DeviceScratch(torch.device("cpu")).open(job_named(plan, "a.weight"), plan.method)
            whole = np.concatenate([to_host(x) for _, x in tensor.stacked()], axis=1)
            for _ in range(3):
                next(iter(tensor.stacked()))
            assert next(start for start, _ in tensor.stacked(begin=5_500)) == 4_800
            assert [start for start, _ in tensor.stacked(every=100)] == [0, 40_000, 80_000]
            np.testing.assert_array_equal(np.concatenate([to_host(x) for _, x in tensor.stacked()], axis=1), whole)

    def test_a_file_that_becomes_shorter_is_named(self, inputs, tmp_path, monkeypatch):
        with make_plan_of("linear", inputs, tmp_path) as plan:
            tensor = DeviceScratch(torch.device("cpu")).open(job_named(plan, "a.weight"), plan.method)
            file = inputs[1] / "model.safetensors"
            file.write_bytes(file.read_bytes()[:2000])
            with pytest.raises(CheckpointError, match=r"m1/model\.safetensors: became shorter while it was read"):
                list(tensor.stacked())

    def test_nan_in_an_input_is_named(self, inputs, tmp_path):
        x = np.zeros((300, 400), np.float32)
        x[2, 3] = np.nan
        save_file({"a.weight": x, "a.bias": x[0].copy()}, inputs[1] / "model.safetensors")
        spec = spec_of("linear", inputs[1:], inputs[0], tmp_path)
        result = merge(spec, tmp_path / "out", quiet=True, device="torch:cpu")
        assert result.non_finite == ["a.weight"]
        assert list(result.non_finite_inputs) == [str(inputs[1])]


def job_named(plan, name):
    return next(job for job in plan.jobs if job.tensor.name == name)


class make_plan_of:  # noqa: N801 - used as a function
    """Plan a merge of three of four models, and close its files in the end."""

    def __init__(self, method: str, inputs: list[Path], work: Path) -> None:
        self.plan = make_plan(spec_of(method, inputs[1:], inputs[0], work))

    def __enter__(self):
        return self.plan

    def __exit__(self, *_):
        self.plan.inputs.close()


class TestChoice:
    """What is refused before anything is read."""

    @pytest.fixture
    def spec(self, tmp_path) -> dict[str, Any]:
        inputs = [checkpoint_of(tmp_path / f"m{i}", i, (4, 6)) for i in range(3)]
        return {"models": [{"model": str(p)} for p in inputs[1:]], "base_model": str(inputs[0])}

    @pytest.mark.parametrize("method", sorted(set(NAMES) - set(ON_DEVICE)))
    def test_methods_of_whole_tensors(self, method, spec, tmp_path):
        with pytest.raises(SpecError, match=f"merge_method: {method} runs on the CPU alone; leave out --device"):
            merge(spec | {"merge_method": method}, tmp_path / "out", device="torch:cpu", quiet=True)
        assert not (tmp_path / "out").exists()

    def test_outputs_that_are_no_checkpoint(self, spec, tmp_path):
        spec |= {"merge_method": "task_arithmetic", "output": {"type": "adapter"}}
        with pytest.raises(SpecError, match=r"output\.type: adapter is computed on the CPU; leave out --device"):
            merge(spec, tmp_path / "out", device="torch:cpu", quiet=True)

    def test_devices_that_are_not_there(self, spec, tmp_path):
        spec |= {"merge_method": "task_arithmetic"}
        with pytest.raises(UnsupportedError, match="device 'gpu' is not one of cpu, cuda, cuda:N, auto"):
            merge(spec, tmp_path / "out", device="gpu", quiet=True)
        with pytest.raises(UnsupportedError, match=r"device cuda:99: torch .* finds \d+ GPUs here"):
            merge(spec, tmp_path / "out", device="cuda:99", quiet=True)

    def test_a_killed_merge_goes_on_only_on_the_same_device(self, spec):
        spec |= {"merge_method": "task_arithmetic"}
        plans = [make_plan(spec, device=name) for name in ("cpu", "torch:cpu")]
        assert plans[0].fingerprint() != plans[1].fingerprint()
        for plan in plans:
            plan.inputs.close()

    def test_the_command_line(self, spec, tmp_path, monkeypatch, capsys):
        spec |= {"merge_method": "task_arithmetic"}
        path = tmp_path / "spec.yaml"
        path.write_text(json.dumps(spec))
        asked: list[str] = []
        monkeypatch.setattr(device, "find_device", asked.append)
        monkeypatch.setattr(plans, "find_device", asked.append)
        for i, options in enumerate((["--device", "cuda:1"], ["--cuda"], ["--gpu-rich"], ["--no-cuda"], [])):
            main(["merge", str(path), str(tmp_path / f"out{i}"), "--quiet", *options])
        assert asked == ["cuda:1", "cuda", "cuda", "cpu", "cpu"]
