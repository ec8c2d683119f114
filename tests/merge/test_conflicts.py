"""Measures of deltas are those of a brute force in float64 over whole state dicts."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests import tiny
from toolkit.checkpoints.adapters import WEIGHTS, open_adapter
from toolkit.checkpoints.compressed import CompressedDelta, open_compressed
from toolkit.checkpoints.deltas import AdapterDelta, DenseDelta
from toolkit.checkpoints.reader import MemoryCheckpoint, open_checkpoint
from toolkit.merge.compare import compare
from toolkit.merge.conflicts import Comparison, Sums
from toolkit.merge.extract import extract
from toolkit.merge.svd import SMALL

RANKS = (1, 3, 8)
State = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]


def sparsely_tuned(base: State, seed: int, share: float = 0.5) -> State:
    """Change a random part of every tensor."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, value in base.items():
        noise = torch.randn(value.shape, generator=generator) * 0.05
        changed[name] = value + (noise * (torch.rand(value.shape, generator=generator) < share)).to(value.dtype)
    return changed


def compared(base: State, tuned: Sequence[State], ranks: Sequence[int] = RANKS) -> Comparison:
    opened = MemoryCheckpoint(base, {}, "base")
    deltas = [DenseDelta(opened, MemoryCheckpoint(state, {}, f"tuned{i}")) for i, state in enumerate(tuned)]
    return compare(opened, deltas, ranks, quiet=True)


def arrays(state: State) -> Arrays:
    return {name: value.detach().double().numpy() for name, value in state.items()}


def differences(base: State, tuned: State) -> Arrays:
    own = arrays(base)
    return {name: value - own[name] for name, value in arrays(tuned).items()}


def part(name: str) -> str:
    """Say by hand what a Llama's tensor belongs to."""
    if name.startswith("model.layers."):
        return name[: len("model.layers.0")]
    return {"model.embed_tokens.weight": "embeddings", "model.norm.weight": "norm", "lm_head.weight": "head"}[name]


def check(sums: Sums, base: Arrays, deltas: Sequence[Arrays], names: Sequence[str], rtol: float) -> None:
    """Compare sums over tensors with sums over all of their elements at once."""
    own = np.concatenate([base[name].reshape(-1) for name in names])
    x = np.array([np.concatenate([delta[name].reshape(-1) for name in names]) for delta in deltas])
    norms = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(sums.norms, norms, rtol=rtol)
    np.testing.assert_allclose(sums.relative_norms, norms / np.linalg.norm(own), rtol=rtol)
    assert sums.count == len(own)
    for i in range(len(x)):
        for j in range(len(x)):
            cosine = x[i] @ x[j] / norms[i] / norms[j] if norms[i] and norms[j] else 0.0
            assert sums.cosines[i, j] == pytest.approx(cosine, abs=rtol)
            both = (x[i] != 0) & (x[j] != 0)
            differ = both & ((x[i] < 0) != (x[j] < 0))
            assert sums.overlap[i, j] == both.sum() / len(own)
            assert sums.conflicts[i, j] == (differ.sum() / both.sum() if both.any() else 0)
    shared = (x != 0).sum(axis=0) > 1
    clashing = shared & (x > 0).any(axis=0) & (x < 0).any(axis=0)
    assert sums.clashes == (clashing.sum() / shared.sum() if shared.any() else 0)
    check_energy(sums, deltas, names, max(rtol, 1e-6))


def check_energy(sums: Sums, deltas: Sequence[Arrays], names: Sequence[str], atol: float) -> None:
    for i, delta in enumerate(deltas):
        squares = [np.linalg.svd(delta[n], compute_uv=False) ** 2 for n in names if delta[n].ndim > 1]
        total = sum(s.sum() for s in squares)
        wanted = [sum(s[..., :r].sum() for s in squares) / total if total else np.nan for r in RANKS]
        np.testing.assert_allclose(sums.energy[i], wanted, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_measure_is_that_of_brute_force(dtype):
    base = tiny.llama().to(dtype).state_dict()
    tuned = [sparsely_tuned(base, seed, share) for seed, share in ((1, 0.5), (2, 0.2), (3, 1.0))]
    tuned[1]["lm_head.weight"] = base["lm_head.weight"]
    found = compared(base, tuned)
    assert found.models == ["tuned0", "tuned1", "tuned2"]
    own, deltas = arrays(base), [differences(base, state) for state in tuned]
    # The difference of two float32 values is rounded to float32; of bfloat16 values of like size it is exact.
    check(found.total, own, deltas, list(base), 1e-6)
    assert set(found.layers) == {part(name) for name in base}
    for layer, sums in found.layers.items():
        check(sums, own, deltas, [name for name in base if part(name) == layer], 1e-6)
    for name, sums in found.tensors.items():
        assert found.shapes[name] == tuple(base[name].shape)
        check(sums, own, deltas, [name], 1e-6)
    means = [np.mean([found.total.energy[i, at] for i in range(3)]) for at in range(3)]
    np.testing.assert_allclose(found.total.mean_energy(), means, rtol=1e-12)
    assert found.total.mean_cosine() == pytest.approx(found.total.cosines[np.triu_indices(3, 1)].mean(), rel=1e-12)
    head = found.layers["head"]
    assert head.mean_cosine() == head.cosines[0, 2], "a delta of zero has no direction"
    np.testing.assert_allclose(head.mean_energy(), head.energy[[0, 2]].mean(axis=0), rtol=1e-12)


def test_nothing_depends_on_the_size_of_slices(monkeypatch):
    base = tiny.llama().state_dict()
    tuned = [sparsely_tuned(base, seed) for seed in (1, 2)]
    wanted = compared(base, tuned)
    for size in (29, 1000):
        monkeypatch.setattr("toolkit.checkpoints.deltas.CHUNK", size)
        found = compared(base, tuned)
        assert found.layers.keys() == wanted.layers.keys()
        for layer, sums in found.layers.items():
            for name, value in vars(wanted.layers[layer]).items():
                exact = name in ("count", "both", "opposite", "shared", "clashing")
                # Every rounding of an inner product is of the size of the norms, however small the product is.
                near = 0 if exact else 1e-12 * np.max(np.abs(value))
                np.testing.assert_allclose(getattr(sums, name), value, rtol=0, atol=near)


def whole_numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_delta_and_its_negative():
    base = {"model.layers.0.weight": whole_numbers(0, 40, 30)}
    change = whole_numbers(1, 40, 30)
    total = compared(base, [{name: value + sign * change for name, value in base.items()} for sign in (1, -1)]).total
    np.testing.assert_allclose(total.cosines, [[1, -1], [-1, 1]], rtol=1e-12)
    assert total.conflicts.tolist() == [[0, 1], [1, 0]]
    assert total.clashes == 1
    assert total.overlap[0, 1] == np.count_nonzero(change) / 1200


def test_disjoint_deltas_neither_agree_nor_conflict():
    base = {"a.weight": whole_numbers(0, 40, 30)}
    first = torch.arange(1200).reshape(40, 30) % 2 == 0
    total = compared(base, [{"a.weight": base["a.weight"] + part} for part in (first.float(), -(~first).float())]).total
    assert total.cosines.tolist() == np.eye(2).tolist()
    assert total.conflicts.tolist() == np.zeros((2, 2)).tolist()
    assert total.clashes == 0
    assert total.overlap.tolist() == [[0.5, 0], [0, 0.5]]


def test_rank_one_delta_has_all_of_its_energy_in_the_first_rank():
    base = {"a.weight": whole_numbers(0, 40, 30), "norm.weight": whole_numbers(1, 30)}
    tuned = {"a.weight": base["a.weight"] + whole_numbers(2, 40, 1) @ whole_numbers(3, 1, 30)}
    found = compared(base, [tuned | {"norm.weight": base["norm.weight"] + 1}])
    np.testing.assert_allclose(found.total.energy, [[1, 1, 1]], rtol=1e-12)
    assert np.isnan(found.tensors["norm.weight"].energy).all(), "a vector has no rank"
    nothing = compared(base, [base]).total
    assert nothing.norms.tolist() == [0]
    assert np.isnan(nothing.energy).all()
    assert np.isnan(nothing.mean_energy()).all()


@pytest.mark.parametrize("chunk", [65536, 20, 4])
def test_more_dimensions_are_a_stack_of_matrices(chunk, monkeypatch):
    monkeypatch.setattr("toolkit.checkpoints.deltas.CHUNK", chunk)
    base = {"model.layers.0.experts": torch.zeros(2, 3, 10, 6)}
    tuned = {"model.layers.0.experts": torch.randn(2, 3, 10, 6, generator=torch.Generator().manual_seed(0))}
    tuned["model.layers.0.experts"][0, 1] = 0
    check_energy(compared(base, [tuned]).total, [arrays(tuned)], list(base), 1e-12)


def test_energy_of_large_matrices():
    """A matrix whose singular values are known; those of matrices of this size are iterated, in float32."""
    rng, shape = np.random.default_rng(0), (1200, 1000)
    assert np.prod(shape) > SMALL
    values = 5.0 / np.arange(1, 1001)
    u, v = (np.linalg.qr(rng.standard_normal((size, 1000)))[0] for size in shape)
    delta = (u * values) @ v.T
    base = {"a.weight": torch.zeros(*shape)}
    total = compared(base, [{"a.weight": torch.from_numpy(delta).float()}]).total
    wanted = [(values[:r] ** 2).sum() / (values**2).sum() for r in RANKS]
    np.testing.assert_allclose(total.energy[0], wanted, atol=1e-3)


def test_adapters_are_measured_as_what_peft_makes_of_them(base, loras):
    names = ["plain", "few", "rslora", "dora", "patterns"]
    with open_checkpoint(base) as opened:
        found = compare(opened, [AdapterDelta(opened, open_adapter(loras[n])) for n in names], RANKS, quiet=True)
    own = tiny.llama().state_dict()
    deltas = [differences(own, tiny.load_merged(base, loras[name]).state_dict()) for name in names]
    for layer, sums in found.layers.items():
        parts = [name for name in own if part(name) == layer]
        x = np.array([np.concatenate([delta[name].reshape(-1) for name in parts]) for delta in deltas])
        np.testing.assert_allclose(sums.products, x @ x.T, rtol=1e-5, atol=1e-5 * (x**2).sum())
        # PEFT's weights are rounded to float32, which turns the sign of what is smaller than that.
        both = np.abs(x[:, None]) * np.abs(x[None]) > 0
        opposite = both & (x[:, None] * x[None] < 0)
        np.testing.assert_allclose(sums.both, both.sum(axis=-1), atol=20)
        np.testing.assert_allclose(sums.opposite, opposite.sum(axis=-1), atol=20)
        check_energy(sums, deltas, parts, 1e-5)
    plain = found.total.energy[names.index("plain")]
    assert plain[-1] == pytest.approx(1, abs=1e-14), "of rank 4, by its factors"
    assert found.tensors["model.norm.weight"].norms.tolist() == [0] * 5


def test_compressed_deltas_are_measured_as_they_are_stored(base, tmp_path):
    model = tiny.llama()
    tuned = [tiny.save_model(tiny.tuned(model, i), tmp_path / f"tuned{i}") for i in range(2)]
    folder = tmp_path / "pairs"
    extract(base, tuned, folder, kind="svd", rank=5, quiet=True)
    with open_checkpoint(base) as opened:
        tasks = [CompressedDelta(opened, open_compressed(f"{folder}#tuned{i}")) for i in range(2)]
        found = compare(opened, tasks, RANKS, quiet=True)
    assert found.models == [f"{folder}#tuned0", f"{folder}#tuned1"]
    stored = {name: value.astype(np.float64) for name, value in load_file(folder / "delta.safetensors").items()}
    own = arrays(model.state_dict())
    deltas = []
    for task in ("tuned0", "tuned1"):
        pairs = {n: stored[f"{n}:rows:{task}"] @ stored[f"{n}:cols:{task}"] for n, v in own.items() if v.ndim == 2}
        whole = {n: stored[f"{n}:whole:{task}"] - v for n, v in own.items() if v.ndim == 1}
        deltas.append(pairs | whole)
    x = np.array([np.concatenate([delta[name].reshape(-1) for name in own]) for delta in deltas])
    np.testing.assert_allclose(found.total.products, x @ x.T, rtol=1e-5, atol=1e-6 * (x**2).sum())
    check_energy(found.total, deltas, list(own), 1e-6)


def test_nan_and_infinity_are_named_and_count_as_unchanged():
    base, name = tiny.llama().state_dict(), "model.layers.1.mlp.up_proj.weight"
    tuned = [sparsely_tuned(base, seed, 1.0) for seed in (1, 2)]
    base[name][3, 4] = float("nan")
    tuned[0][name][5, :2] = float("inf")
    tuned[0][name][6, 7] = float("nan")
    tuned[1]["model.norm.weight"][0] = -float("inf")
    found = compared(base, tuned)
    named = [(bad.source, bad.tensor, bad.elements) for bad in found.unusable]
    assert named == [("base", name, 1), ("tuned0", name, 3), ("tuned1", "model.norm.weight", 1)]
    own, deltas = arrays(base), [differences(base, state) for state in tuned]
    for values in (own, *deltas):
        for value in values.values():
            value[~np.isfinite(value)] = 0
    check(found.total, own, deltas, list(base), 1e-6)


def test_pair_with_nan_in_one_row(base, loras, tmp_path):
    folder = shutil.copytree(loras["few"], tmp_path / "broken")
    stored, name = load_file(folder / WEIGHTS), "model.layers.0.self_attn.q_proj"
    stored[f"base_model.model.{name}.lora_B.weight"][7] = np.nan
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    with open_checkpoint(base) as opened:
        both = [AdapterDelta(opened, open_adapter(path)) for path in (loras["few"], folder)]
        found = compare(opened, both, RANKS, quiet=True)
    assert [(bad.source, bad.tensor, bad.elements) for bad in found.unusable] == [(str(folder), f"{name}.weight", 48)]
    own = tiny.llama().state_dict()
    delta = differences(own, tiny.load_merged(base, loras["few"]).state_dict())
    delta = {n: value.copy() for n, value in delta.items()}
    delta[f"{name}.weight"][7] = 0
    assert found.total.norms[1] == pytest.approx(np.sqrt(sum((v**2).sum() for v in delta.values())), rel=1e-5)
    np.testing.assert_allclose(found.tensors[f"{name}.weight"].energy[1, 1:], 1, atol=1e-9)


def test_embedding_that_an_adapter_stores_whole_and_adapts(base, tmp_path):
    folder = tiny.save_lora(base, tmp_path / "lora", r=2, lora_alpha=6, target_modules=["embed_tokens"])
    stored, module = load_file(folder / WEIGHTS), "base_model.model.model.embed_tokens"
    whole = next(name for name in stored if name.endswith("base_layer.weight"))
    stored[whole] = stored[whole] + np.random.default_rng(0).standard_normal(stored[whole].shape).astype(np.float32)
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    with open_checkpoint(base) as opened:
        found = compare(opened, [AdapterDelta(opened, open_adapter(folder))], RANKS, quiet=True)
    name, own = "model.embed_tokens.weight", arrays(tiny.llama().state_dict())
    a, b = (stored[f"{module}.lora_embedding_{part}"].astype(np.float64) for part in "AB")
    delta = {name: stored[whole] - own[name] + 3 * (b @ a).T}
    check_energy(found.tensors[name], [delta], [name], 1e-6)
    assert found.total.norms[0] == pytest.approx(np.linalg.norm(delta[name]), rel=1e-5)


def test_head_that_only_a_fine_tune_stores_is_a_change_of_the_embedding():
    state = tiny.llama().state_dict()
    base = {name: value for name, value in state.items() if name != "lm_head.weight"}
    own_head = base | {"lm_head.weight": state["lm_head.weight"]}
    tied = sparsely_tuned(base, 1)
    found = compared(base, [own_head, tied])
    wanted = [state["lm_head.weight"], tied["model.embed_tokens.weight"]]
    deltas = [{"head": (value - base["model.embed_tokens.weight"]).double().numpy()} for value in wanted]
    check(found.layers["head"], {"head": arrays(base)["model.embed_tokens.weight"]}, deltas, ["head"], 1e-6)
    assert found.layers["embeddings"].norms[0] == 0


def test_layers_come_in_the_order_of_the_model():
    names = ["lm_head.weight", *sorted(f"model.layers.{i}.x.weight" for i in range(12))]
    names += ["model.norm.weight", "projector.weight", "model.embed_tokens.weight", "vision.blocks.0.weight"]
    state = {name: torch.zeros(2, 2) for name in names} | {"model.layers.0.ids": torch.zeros(2, dtype=torch.int64)}
    found = compared(state, [state])
    layers = [f"model.layers.{i}" for i in range(12)]
    assert list(found.layers) == ["embeddings", *layers, "vision.blocks.0", "other", "norm", "head"]
    assert "model.layers.0.ids" not in found.tensors


def test_models_of_one_name_are_told_apart(base, loras):
    with open_checkpoint(base) as opened:
        deltas = [AdapterDelta(opened, open_adapter(loras["few"])) for _ in range(2)]
        found = compare(opened, deltas, quiet=True)
    assert found.models == [str(loras["few"]), f"{loras['few']} (2)"]
    np.testing.assert_allclose(found.total.cosines, 1, rtol=1e-12)
    assert found.total.energy.shape == (2, 0)


def test_memory_does_not_grow_with_the_tensor():
    state = {"a.weight": torch.zeros(8192, 1024)}  # 32 MiB
    compared(state, [state])
    tracemalloc.start()
    try:
        compared(state, [state, {"a.weight": state["a.weight"] + 1}], ranks=())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_progress_ends_at_what_is_read(monkeypatch):
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr("toolkit.progress._redirect", lambda state: seen.append((state.done, state.total)))
    base = {"a.weight": torch.zeros(4, 3), "norm.weight": torch.zeros(3)}
    opened = MemoryCheckpoint(base, {}, "base")
    compare(opened, [DenseDelta(opened, MemoryCheckpoint(base, {}, "tuned"))], RANKS)
    assert seen[-1] == (48 + 2 * 48 + 12 + 12, 48 + 2 * 48 + 12 + 12)


def test_state_of_files_is_that_of_memory(base, tmp_path):
    model = tiny.llama()
    tuned = tiny.tuned(model, 0)
    folder: Path = tiny.save_model(tuned, tmp_path / "tuned", max_shard_size="100KB")
    with open_checkpoint(base) as opened, open_checkpoint(folder) as other:
        found = compare(opened, [DenseDelta(opened, other)], RANKS, quiet=True)
    wanted = compared(model.state_dict(), [tuned.state_dict()])
    np.testing.assert_allclose(found.total.norms, wanted.total.norms, rtol=1e-14)
    np.testing.assert_allclose(found.total.energy, wanted.total.energy, rtol=1e-12)
