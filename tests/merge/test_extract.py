"""Fine-tunes become small changes of their base: as exact as the best of their size, and what other tools read."""

from __future__ import annotations

import json
from itertools import accumulate, pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import toolkit
from tests import tiny
from toolkit.checkpoints.adapters import open_adapter
from toolkit.checkpoints.compressed import CompressedDelta, open_compressed
from toolkit.checkpoints.deltas import AdaptedCheckpoint, AdapterDelta, Delta, chunks
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.cli import main
from toolkit.errors import CheckpointError, OutputError, SpecError, UnsupportedError
from toolkit.jobs.steps import run_step
from toolkit.merge.extract import extract
from toolkit.merge.svd import SMALL, leading, rank_for_energy, ranks_for_budget, singular_values

IDS = torch.tensor([[1, 2, 3, 40, 5], [9, 8, 7, 6, 55]])


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> list[Path]:
    """Three full fine-tunes of the base, float32."""
    root = tmp_path_factory.mktemp("tuned")
    model = AutoModelForCausalLM.from_pretrained(base)
    return [tiny.save_model(tiny.tuned(model, i), root / f"tuned{i}") for i in range(3)]


def weights(folder: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.tensor(name).double().numpy() for name in checkpoint.tensors}


def differences(base: Path, folder: Path) -> dict[str, np.ndarray]:
    start = weights(base)
    return {name: value - start[name] for name, value in weights(folder).items()}


def values(delta: Delta) -> dict[str, np.ndarray]:
    """Read every tensor that a delta touches, slice by slice."""
    found = {}
    for name, info in delta.base.tensors.items():
        if delta.touches(name):
            out = np.empty(info.count, np.float32)
            for start, stop in chunks(info.shape):
                own = np.empty(stop - start, np.float32)
                delta.base.read(name, start, stop, own)
                delta.read(name, start, stop, own, out[start:stop])
            found[name] = out.reshape(info.shape).astype(np.float64)
    return found


def compressed(base: Path, source: Path | str) -> dict[str, np.ndarray]:
    return values(CompressedDelta(open_checkpoint(base), open_compressed(source)))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def gpt2(**changes: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 60, "n_positions": 32, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**(sizes | changes))).eval()


def qwen() -> Qwen2ForCausalLM:
    """Return a model whose projections have biases, and whose head is its own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=60, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    return Qwen2ForCausalLM(config).eval()


ARCHITECTURES = {
    "untied": lambda: tiny.llama(),
    "tied": lambda: tiny.llama(tie_word_embeddings=True),
    "transposed": gpt2,
    "biases": qwen,
}


def disturb(model: torch.nn.Module, pattern: str = "") -> torch.nn.Module:
    """Change every weight whose name holds a pattern."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if pattern in name:
                value.add_(torch.randn_like(value) * 0.1)
    return model


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_peft_computes_the_fine_tune_at_full_rank(architecture, embeddings, tmp_path):
    model = ARCHITECTURES[architecture]()
    base = tiny.save_model(model, tmp_path / "base")
    start = logits(model)
    tiny.save_model(disturb(model), tmp_path / "tuned")
    result = extract(base, tmp_path / "tuned", tmp_path / "out", rank="full", embeddings=embeddings, quiet=True)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    assert (start - logits(model)).abs().max() > 0.5
    torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(tiny.load_merged(base, tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)
    ours = values(AdapterDelta(open_checkpoint(base), open_adapter(tmp_path / "out")))
    wanted = differences(base, tmp_path / "tuned")
    assert ours.keys() == wanted.keys()
    for name, difference in wanted.items():
        assert relative(ours[name], difference) < 1e-6
    assert result.numbers["relative_error"]["tuned"] < 1e-6
    assert result.numbers["whole"] + result.numbers["compressed"] == len(wanted)


@pytest.mark.parametrize("pattern", ["norm", "q_proj.bias", "self_attn.q_proj", "embed_tokens"])
def test_stock_peft_computes_a_fine_tune_of_some_tensors(pattern, tmp_path):
    model = qwen()
    base = tiny.save_model(model, tmp_path / "base")
    tiny.save_model(disturb(model, pattern), tmp_path / "tuned")
    extract(base, tmp_path / "tuned", tmp_path / "out", rank="full", quiet=True)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-4, atol=1e-4)
    touched = open_adapter(tmp_path / "out").touched
    assert touched == {name for name, value in model.named_parameters() if pattern in name}
    adapted.save_pretrained(tmp_path / "again")
    assert open_adapter(tmp_path / "again").touched >= touched, "PEFT knows that these belong to the adapter"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # and the adapter unties them
def test_fine_tune_whose_head_is_no_longer_its_embedding(tmp_path):
    base = tiny.save_model(tiny.llama(tie_word_embeddings=True), tmp_path / "base")
    model = tiny.llama(tie_word_embeddings=False)
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(base).state_dict())
    tiny.save_model(disturb(disturb(model, "lm_head")), tmp_path / "tuned")  # the head twice
    result = extract(base, tmp_path / "tuned", tmp_path / "out", rank="full", quiet=True)
    assert result.numbers["whole"] == 9
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-4, atol=1e-4)


def test_bias_of_a_linear_that_a_budget_leaves_out(tmp_path):
    """PEFT calls the bias of an adapted linear otherwise than that of another."""
    model = qwen()
    base = tiny.save_model(model, tmp_path / "base")
    disturb(model, "self_attn.k_proj.bias")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(1e-4)
        model.model.layers[1].mlp.up_proj.weight.add_(torch.ones(32, 24))
    tiny.save_model(model, tmp_path / "tuned")
    biases = 2 * 12 * 4
    extract(base, tmp_path / "tuned", tmp_path / "out", budget=biases + 4 * (32 + 24), quiet=True)
    assert list(open_adapter(tmp_path / "out").parts) == ["model.layers.1.mlp.up_proj"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-3, atol=1e-3)


def test_what_is_no_matrix_of_a_layer_is_kept_to_the_bit(base, tuned, tmp_path):
    extract(base, tuned[0], tmp_path / "lora", rank=2, quiet=True)
    extract(base, tuned[0], tmp_path / "bit", kind="bit", quiet=True)
    adapter, folder = open_adapter(tmp_path / "lora"), open_compressed(tmp_path / "bit")
    with open_checkpoint(tuned[0]) as checkpoint:
        names = [n for n in checkpoint.tensors if "norm" in n or "embed" in n or "lm_head" in n]
        assert adapter.whole.keys() == set(names)
        for name in names:
            assert adapter.store.read_raw(adapter.whole[name]).tobytes() == checkpoint.read_raw(name).tobytes()
            assert folder.store.read_raw(f"{name}:whole:tuned0").tobytes() == checkpoint.read_raw(name).tobytes()


@pytest.mark.parametrize("kind", ["lora", "svd"])
def test_error_of_a_rank_is_that_of_eckart_and_young(kind, base, tuned, tmp_path):
    result = extract(base, tuned[0], tmp_path / "out", kind=kind, rank=5, quiet=True)
    wanted = differences(base, tuned[0])
    opened = AdapterDelta(open_checkpoint(base), open_adapter(tmp_path / "out")) if kind == "lora" else None
    got = values(opened) if opened else compressed(base, tmp_path / "out")
    factored = {n for n, d in wanted.items() if d.ndim == 2 and (kind == "svd" or "layers" in n)}
    assert result.numbers["compressed"] == len(factored)
    for name, difference in wanted.items():
        s = np.linalg.svd(difference, compute_uv=False) if name in factored else np.zeros(6)
        best = np.linalg.norm(s[5:]) / np.linalg.norm(difference)
        assert result.errors["tuned0"][name] == pytest.approx(best, rel=1e-5, abs=1e-7)
        assert relative(got[name], difference) == pytest.approx(best, rel=1e-5, abs=1e-7)


def test_energy_is_reached_with_the_fewest_ranks(base, tuned, tmp_path):
    result = extract(base, tuned[0], tmp_path / "out", kind="svd", energy=0.7, quiet=True)
    folder = open_compressed(tmp_path / "out")
    for name, difference in differences(base, tuned[0]).items():
        if difference.ndim == 2:
            share = np.cumsum(np.linalg.svd(difference, compute_uv=False) ** 2) / np.square(difference).sum()
            rank = int(np.argmax(share >= 0.7)) + 1
            assert folder.store.info(folder.parts[name]["rows"]).shape == (difference.shape[0], rank)
            assert result.errors["tuned0"][name] ** 2 == pytest.approx(1 - share[rank - 1], rel=1e-4)


def test_budget_is_kept_and_better_than_one_rank_for_all(base, tuned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tuned[0])
    with torch.no_grad():  # one matrix that matters more than the others
        model.model.layers[1].mlp.up_proj.weight.add_(torch.randn(96, 48) * 0.05)
    tiny.save_model(model, tmp_path / "tuned")
    fixed = extract(base, tmp_path / "tuned", tmp_path / "fixed", rank=4, quiet=True)
    stored = open_adapter(tmp_path / "fixed").nbytes
    spread = extract(base, tmp_path / "tuned", tmp_path / "spread", budget=stored, quiet=True)
    adapter = open_adapter(tmp_path / "spread")
    assert stored - 4 * (48 + 96) < adapter.nbytes <= stored
    assert adapter.rank("model.layers.1.mlp.up_proj") > 6
    assert spread.numbers["relative_error"]["tuned"] < 0.97 * fixed.numbers["relative_error"]["tuned"]
    with pytest.raises(UnsupportedError, match=r"a budget of 1\.0 kB is less than the 10\d\.\d kB of the tensors"):
        extract(base, tuned[0], tmp_path / "small", budget="1kB", quiet=True)


@pytest.mark.parametrize("costs", [(2, 2, 2), (2, 3, 7)])
def test_spread_of_a_budget_is_the_best_of_all(costs):
    rng = np.random.default_rng(0)
    found = {name: np.sort(rng.uniform(0.5, 1.5, size=4))[::-1] for name in "abc"}
    every = list(product(range(5), repeat=3))
    spent = [sum(c * rank for c, rank in zip(costs, ranks, strict=True)) for ranks in every]
    errors = [sum((s[r:] ** 2).sum() for s, r in zip(found.values(), ranks, strict=True)) for ranks in every]
    density = sorted(((s**2 / c, c) for v, c in zip(found.values(), costs, strict=True) for s in v), reverse=True)
    exact = set(accumulate(cost for _, cost in density))
    for budget in range(50):
        ranks = ranks_for_budget(found, dict(zip("abc", costs, strict=True)), budget)
        at = every.index(tuple(ranks.values()))
        best = min(error for error, cost in zip(errors, spent, strict=True) if cost <= budget)
        assert spent[at] <= budget
        # Ranks of unequal size are a knapsack, which the densest ranks solve where they fill it to the brim.
        if budget in exact or len(set(costs)) == 1:
            assert errors[at] == pytest.approx(best, abs=1e-12)
        assert errors[at] - best < max(cost * gain for gain, cost in density)


def test_rank_for_energy_at_its_ends():
    assert rank_for_energy(np.array([3.0, 2.0, 0.0]), 1.0) == 2
    assert rank_for_energy(np.array([3.0, 4.0])[::-1], 16 / 25) == 1
    assert rank_for_energy(np.zeros(3), 0.5) == 0


@pytest.mark.parametrize("decay", [0.0, 0.02, 0.5])
def test_few_singular_values_of_a_large_matrix(decay):
    rng = np.random.default_rng(0)
    rows, cols = 1500, 800
    s = np.exp(-decay * np.arange(cols))
    u, v = (np.linalg.qr(rng.standard_normal((n, cols)))[0] for n in (rows, cols))
    matrix = ((u * s) @ v.T).astype(np.float32)
    assert matrix.size > SMALL
    found_u, found_s, found_vt, rest = leading(matrix, 12)
    best = np.linalg.norm(s[12:])
    reached = np.linalg.norm(matrix - (found_u * found_s) @ found_vt)
    noise = 1e-3 * np.linalg.norm(s)  # of a float32 sum of squares
    assert reached == pytest.approx(best, rel=2e-3, abs=noise)
    assert rest == pytest.approx(best, rel=2e-3, abs=noise)
    assert found_u.shape == (rows, 12)
    np.testing.assert_allclose(found_u.T @ found_u, np.eye(12), atol=1e-5)
    np.testing.assert_allclose(singular_values(matrix)[:30], s[:30], rtol=1e-4, atol=1e-6)


def test_rank_of_an_extracted_lora_is_that_of_the_one_it_comes_from(base, loras, tmp_path):
    result = extract(base, loras["plain"], tmp_path / "out", rank=4, quiet=True)
    assert max(result.errors["plain"].values()) < 1e-6
    again = extract(base, loras["dora"], tmp_path / "dora", kind="svd", rank="full", quiet=True)
    merged = tiny.load_merged(base, loras["dora"]).state_dict()
    start = weights(base)
    for name, change in compressed(base, tmp_path / "dora").items():
        np.testing.assert_allclose(start[name] + change, merged[name].double(), rtol=1e-4, atol=1e-5)
    assert again.numbers["bytes_before"] == open_adapter(loras["dora"]).nbytes


def test_dtype_of_the_factors(base, tuned, tmp_path):
    result = extract(base, tuned[0], tmp_path / "out", rank="full", dtype="bfloat16", quiet=True)
    adapter = open_adapter(tmp_path / "out")
    dtypes = {name.rpartition(".lora_")[1]: info.dtype.name for name, info in adapter.store.tensors.items()}
    assert dtypes == {".lora_": "BF16", "": "F32"}
    name = "model.layers.0.mlp.up_proj.weight"
    assert 1e-4 < result.errors["tuned0"][name] < 2**-8, "the error of rounding is reported"


# Masks.


@pytest.mark.system("tall_masks")
def test_one_task_is_rebuilt_exactly(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16)
    start = tiny.save_model(model, tmp_path / "base")
    tiny.save_model(disturb(model, "layers.1"), tmp_path / "tuned")
    result = extract(start, tmp_path / "tuned", tmp_path / "out", kind="mask", dtype="float32", quiet=True)
    assert set(result.errors["tuned"].values()) == {0.0}
    rebuilt = AdaptedCheckpoint(CompressedDelta(open_checkpoint(start), open_compressed(tmp_path / "out")))
    for name, value in weights(tmp_path / "tuned").items():
        out = np.empty(value.size, np.float32)
        rebuilt.read(name, 0, value.size, out)
        assert np.array_equal(out.reshape(value.shape), value), name
    assert not rebuilt.delta.touches("model.layers.0.mlp.up_proj.weight")


@pytest.mark.system("tall_masks")
@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0, 5.0])
def test_disjoint_supports_are_rebuilt_exactly(strength, base, tmp_path):
    folders = []
    for task in range(3):
        model = AutoModelForCausalLM.from_pretrained(base)
        rng = np.random.default_rng(task)
        with torch.no_grad():
            for name, value in model.named_parameters():
                places = np.arange(value.numel()) % 3 == task
                change = np.where(places, rng.standard_normal(value.numel()) * 0.02, 0).reshape(value.shape)
                value.add_(torch.from_numpy(change * ("norm" not in name)).float())
        folders.append(tiny.save_model(model, tmp_path / f"tuned{task}"))
    extract(base, folders, tmp_path / "out", kind="mask", quiet=True, **{"lambda": strength})
    for folder in folders:
        wanted = differences(base, folder)
        for name, change in compressed(base, f"{tmp_path / 'out'}#{folder.name}").items():
            assert np.array_equal(change.astype(np.float32), wanted[name].astype(np.float32)), name


@pytest.mark.system("tall_masks")
def test_masks_are_those_of_the_formula_and_shrink_with_lambda(base, tuned, tmp_path):
    """By numpy, in float64, from the weights; the bits counted one by one."""
    wanted = {f.name: differences(base, f) for f in tuned}
    name = "model.layers.1.mlp.up_proj.weight"
    vector = sum(d[name] for d in wanted.values())
    kept = []
    for strength in (0.0, 0.4, 1.0, 3.0):
        out = tmp_path / f"out{strength}"
        extract(base, tuned, out, kind="mask", quiet=True, **{"lambda": [strength, 0.7, strength]})
        folder = open_compressed(f"{out}#tuned2")
        raw = folder.store.read_raw(f"{name}:mask:tuned2")
        assert len(raw) == -(-vector.size // 8)
        bits = np.array([raw[i // 8] >> (i % 8) & 1 for i in range(vector.size)], bool).reshape(vector.shape)
        margin = np.abs(wanted["tuned2"][name]) - strength * np.abs(vector - wanted["tuned2"][name])
        assert np.array_equal(bits[np.abs(margin) > 1e-6], margin[np.abs(margin) > 1e-6] > 0)
        np.testing.assert_allclose(compressed(base, f"{out}#tuned2")[name], bits * vector, rtol=1e-4, atol=1e-6)
        kept.append(bits)
        other = open_compressed(f"{out}#tuned1").store.read_raw(f"{name}:mask:tuned1")
        assert 0 < np.unpackbits(other).sum() < vector.size
    for more, fewer in pairwise(kept):
        assert not np.any(fewer & ~more)
        assert fewer.sum() < more.sum()


@pytest.mark.system("tall_masks")
def test_default_lambda_leaves_the_least_error_of_any_mask(base, tuned, tmp_path):
    result = extract(base, tuned, tmp_path / "out", kind="mask", quiet=True)
    wanted = {f.name: differences(base, f) for f in tuned}
    for name, change in wanted["tuned1"].items():
        vector = sum(d[name] for d in wanted.values())
        # Every element apart: keep it or not, whichever is nearer.
        best = np.minimum(np.abs(change), np.abs(change - vector)) if change.ndim > 1 else np.zeros(1)
        reached = result.errors["tuned1"][name]
        assert reached == pytest.approx(np.linalg.norm(best) / np.linalg.norm(change), rel=1e-5, abs=1e-9)


@pytest.mark.system("tall_masks")
def test_size_of_base_vector_and_masks(tmp_path):
    """T models of float32 weights take (64 + T) / (32 T) of their bytes, the base included."""
    model = tiny.llama(hidden_size=128, intermediate_size=256)
    base = tiny.save_model(model, tmp_path / "base")
    folders = [tiny.save_model(tiny.tuned(model, i), tmp_path / f"tuned{i}") for i in range(4)]
    result = extract(base, folders, tmp_path / "out", kind="mask", quiet=True)
    with open_checkpoint(base) as checkpoint:
        share = (checkpoint.nbytes + result.numbers["bytes_after"]) / result.numbers["bytes_before"]
    assert share == pytest.approx((64 + 4) / (32 * 4), rel=0.03)


# Signs.


def unpacked(folder, name: str, count: int) -> np.ndarray:
    raw = folder.store.read_raw(name)
    return np.array([raw[i // 8] >> (i % 8) & 1 for i in range(count)], bool)


@pytest.mark.parametrize("scale", ["row", "tensor"])
def test_signs_and_the_least_squares_scale(scale, base, tuned, tmp_path):
    options = {"embeddings": True, "scale": scale}
    result = extract(base, tuned[:2], tmp_path / "out", kind="bit", quiet=True, **options)
    for folder in tuned[:2]:
        wanted = differences(base, folder)
        got = compressed(base, f"{tmp_path / 'out'}#{folder.name}")
        for name, change in wanted.items():
            if change.ndim < 2:
                assert relative(got[name], change) < 1e-7
                continue
            signs = np.where(change >= 0, 1.0, -1.0)
            # The one scale a that makes |change - a * signs| least, by linear least squares.
            groups = zip(signs, change, strict=True) if scale == "row" else [(signs, change)]
            scales = [np.linalg.lstsq(s.reshape(-1, 1), c.reshape(-1), rcond=None)[0][0] for s, c in groups]
            expected = signs * np.array(scales)[:, None]
            np.testing.assert_allclose(got[name], expected, rtol=1e-5)
            assert result.errors[folder.name][name] == pytest.approx(relative(expected, change), rel=1e-4)
            stored = unpacked(open_compressed(tmp_path / "out"), f"{name}:signs:{folder.name}", change.size)
            assert np.array_equal(stored, change.reshape(-1) >= 0)


def test_bits_of_tensors_that_are_read_in_several_slices(tmp_path):
    """Rows of 317 elements: slices end between two bytes."""
    rng = np.random.default_rng(0)
    model = tiny.llama(hidden_size=316, intermediate_size=317, num_hidden_layers=1, num_attention_heads=2)
    base = tiny.save_model(model, tmp_path / "base")
    name = "model.layers.0.mlp.down_proj.weight"
    change = rng.standard_normal((316, 317)).astype(np.float32)
    model.load_state_dict({name: model.state_dict()[name] + torch.from_numpy(change)}, strict=False)
    tiny.save_model(model, tmp_path / "tuned")
    wanted = differences(base, tmp_path / "tuned")[name]
    assert len(list(chunks((316, 317)))) > 1
    extract(base, tmp_path / "tuned", tmp_path / "bit", kind="bit", quiet=True)
    expected = np.where(wanted >= 0, 1, -1) * np.abs(wanted).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(compressed(base, tmp_path / "bit")[name], expected, rtol=1e-5)
    extract(base, tmp_path / "tuned", tmp_path / "mask", kind="mask", quiet=True)
    np.testing.assert_allclose(compressed(base, tmp_path / "mask")[name], wanted, rtol=1e-6)
    extract(base, tmp_path / "tuned", tmp_path / "svd", kind="svd", rank=300, quiet=True)
    u, s, vt = np.linalg.svd(wanted)
    np.testing.assert_allclose(compressed(base, tmp_path / "svd")[name], (u[:, :300] * s[:300]) @ vt[:300], atol=1e-4)


# The command, and what goes wrong.


def test_command_report_and_card(base, tuned, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["extract", str(base), f"one={tuned[0]}", f"two={tuned[1]}", str(out), "--as", "bit", "--json", "-q"]
    assert main(given) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert list(numbers["fine_tunes"]) == ["one", "two"]
    assert numbers["bytes_before"] == sum(open_checkpoint(f).nbytes for f in tuned[:2])
    assert numbers["bytes_after"] == (out / "delta.safetensors").stat().st_size
    change, errors = differences(base, tuned[1]), numbers["relative_error_of_tensors"]["two"]
    squares = sum((errors[name] * np.linalg.norm(d)) ** 2 for name, d in change.items())
    whole = sum(np.square(d).sum() for d in change.values())
    assert numbers["relative_error"]["two"] == pytest.approx((squares / whole) ** 0.5, rel=1e-5)
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == [str(base)]
    assert "as: bit" in card
    assert main(["extract", str(base), str(tuned[0]), str(out), "--overwrite", "--rank", "2"]) == 0
    shown = capsys.readouterr().out
    assert "times smaller" in shown
    assert "relative error of tuned0" in shown
    assert open_adapter(out).rank("model.layers.0.mlp.up_proj") == 2


def test_step_of_a_recipe_and_public_function(base, tuned, tmp_path):
    spec = {"base": str(base), "tuned": {"a": str(tuned[0])}, "as": "svd", "rank": 3, "keep": "mlp"}
    numbers = run_step("extract", spec, tmp_path / "step", quiet=True)
    assert numbers["compressed"] == 14
    model = AutoModelForCausalLM.from_pretrained(tuned[0])
    result = toolkit.extract(base, {"a": model}, tmp_path / "call", kind="svd", rank=3, keep=["mlp"], quiet=True)
    assert (result.path / "delta.safetensors").read_bytes() == (tmp_path / "step/delta.safetensors").read_bytes()


def test_same_bytes_again(base, tuned, tmp_path):
    for kind in ("lora", "svd", "mask", "bit"):
        for turn in "ab":
            extract(base, tuned[0], tmp_path / turn, kind=kind, quiet=True, overwrite=True)
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file


WRONG = [
    ({"tuned": "nowhere/to/be/found"}, SpecError, r"models\[0\]\.model: nowhere/to/be/found: no such folder"),
    ({"rank": 3, "energy": 0.5}, SpecError, "give one of rank, energy and budget"),
    ({"kind": "bit", "rank": 3}, SpecError, "rank is an option of lora and svd, not of bit"),
    ({"budget": "much"}, SpecError, "budget: not a size such as 20MB, got 'much'"),
    ({"dtype": "int8"}, SpecError, "dtype: cannot hold weights"),
    ({"rnak": 3}, SpecError, "unknown key 'rnak'; did you mean 'rank'"),
    ({"kind": "mask", "lambda": [0.1, 0.2]}, SpecError, "one for each of 1 fine-tunes"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[str(c) for c, _, _ in WRONG])
def test_wrong_options(change, kind, message, base, tuned, tmp_path):
    given = {"base": base, "tuned": str(tuned[0])} | change
    with pytest.raises(kind, match=message):
        extract(given.pop("base"), given.pop("tuned"), tmp_path / "out", quiet=True, **given)
    assert list(tmp_path.iterdir()) == []


def test_fine_tunes_that_cannot_be_extracted(base, tuned, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SpecError, match="one LoRA folder holds one fine-tune"):
        extract(base, tuned, out, quiet=True)
    with pytest.raises(SpecError, match="two fine-tunes would be called 'tuned0'"):
        extract(base, [tuned[0], tuned[0]], out, kind="bit", quiet=True)
    with pytest.raises(SpecError, match="is the base itself"):
        extract(base, base, out, quiet=True)
    same = tiny.save_model(AutoModelForCausalLM.from_pretrained(base), tmp_path / "same")
    with pytest.raises(UnsupportedError, match=r"same: nothing differs from .*base"):
        extract(base, same, out, quiet=True)
    other = tiny.save_model(tiny.llama(hidden_size=32), tmp_path / "other")
    with pytest.raises(SpecError, match=r"models\[0\]\.model: .* shape \[262, 32\], but \[262, 48\]"):
        extract(base, other, out, quiet=True)
    broken = AutoModelForCausalLM.from_pretrained(base)
    broken.model.norm.weight.data[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or infinity"):
        extract(base, broken, out, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"same", "other"}
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(OutputError, match="exists already"):
        extract(base, tuned[0], out, quiet=True)
