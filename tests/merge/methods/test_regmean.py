"""RegMean against least squares over all inputs, and the inner products against hooks of transformers' own run."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from tests import tiny
from tests.merge.laws import Arrays, Example, Measured, settings
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.merge.method import load_method
from toolkit.merge.run import merge
from toolkit.merge.spec import DataSpec
from toolkit.merge.statistics.models import examples_of, tokenizer_of

EXAMPLE = Example({"weight": (0.5, 0.3, 0.2), "alpha": 0.8}, neutral={}, rtol=1e-4)

RNG = np.random.default_rng(0)


def combined(x: np.ndarray, grams: np.ndarray, transposed: bool = False, **params: object) -> np.ndarray:
    loaded, given = load_method("regmean"), settings("regmean", params, len(x))
    tensor = Arrays(x, "tensor")
    tensor.statistics = Measured(grams)
    tensor.statistics.transposed = transposed
    return loaded.combine(tensor.x.copy(), given, loaded.prepare(tensor, given), 0)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_the_least_squares_fit_to_all_outputs(transposed):
    weights = RNG.standard_normal((3, 5, 8)).astype(np.float32)
    inputs = [RNG.standard_normal((40, 8)) for _ in range(3)]
    grams = np.stack([x.T @ x / len(x) for x in inputs])
    stored = weights.transpose(0, 2, 1) if transposed else weights
    got = combined(np.ascontiguousarray(stored), grams, transposed, alpha=1.0, ridge=0.0)
    everything = np.concatenate(inputs)
    outputs = np.concatenate([x @ w.T for x, w in zip(inputs, weights.astype(np.float64), strict=True)])
    expected = np.linalg.lstsq(everything, outputs, rcond=None)[0]
    np.testing.assert_allclose(got if transposed else got.T, expected, rtol=1e-4, atol=1e-5)


def test_alpha_and_weight():
    weights = RNG.standard_normal((2, 5, 8)).astype(np.float32)
    grams = np.stack([x.T @ x for x in RNG.standard_normal((2, 40, 8))])
    scaled = [0.6 * g + 0.4 * np.diag(np.diag(g)) for g in grams.astype(np.float32).astype(np.float64)]
    left = 0.75 * scaled[0] + 0.25 * scaled[1]
    right = 0.75 * scaled[0] @ weights[0].T + 0.25 * scaled[1] @ weights[1].T
    got = combined(weights, grams, alpha=0.6, ridge=0.0, weight=(3.0, 1.0))
    np.testing.assert_allclose(got.T, np.linalg.solve(left, right), rtol=1e-4, atol=1e-5)
    alone = combined(weights, grams, alpha=0.0, ridge=0.0)
    diagonal = np.stack([np.diag(g) for g in grams])[:, None, :]
    np.testing.assert_allclose(alone, (diagonal * weights).sum(0) / diagonal.sum(0), rtol=1e-4, atol=1e-5)


def test_inputs_that_no_data_has_are_averaged():
    weights = RNG.standard_normal((2, 5, 8)).astype(np.float32)
    inputs = RNG.standard_normal((2, 40, 8))
    inputs[:, :, 3:5] = 0
    got = combined(weights, np.stack([x.T @ x for x in inputs]))
    np.testing.assert_allclose(got[:, 3:5], weights[:, :, 3:5].mean(0), rtol=1e-3, atol=1e-5)
    zero = combined(weights, np.zeros((2, 8, 8)))
    np.testing.assert_allclose(zero, weights.mean(0), rtol=1e-5, atol=1e-6)
    singular = combined(weights, np.stack([x.T @ x for x in inputs]), ridge=0.0)
    assert np.isfinite(singular).all()


def rows_of(folder: Path, i: int) -> str:
    rows = [{"prompt": f"task {i}: {n}", "completion": "yes" * (n + 1)} for n in range(3)]
    path = folder / f"rows{i}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def inner_products(model: torch.nn.Module, folder: str, rows: str) -> dict[str, torch.Tensor]:
    """What enters every linear layer, `X^T X` over tokens, by the layer's name."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_hook(lambda m, x, y, name=name: seen.setdefault(name, []).append(x[0][0].double()))
    with open_checkpoint(folder) as checkpoint:
        examples = examples_of([rows], tokenizer_of(checkpoint), tiny.CONTEXT, DataSpec())
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([example.tokens]))
    return {name: (x := torch.cat(parts)).T @ x / len(x) for name, parts in seen.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_whole_merge(kind, tmp_path):
    """Norms, biases and embeddings are averaged; a head of its own is a linear layer as well, a tied one is not."""
    if kind == "llama":
        models = [tiny.llama(num_hidden_layers=2)]
        models.append(tiny.tuned(models[0], 1, scale=0.2))
    else:
        config = GPT2Config(vocab_size=260, n_embd=24, n_layer=2, n_head=4, n_positions=tiny.CONTEXT)
        models = []
        for seed in range(2):
            torch.manual_seed(seed)
            models.append(GPT2LMHeadModel(config).eval())
    folders = [str(tiny.save_model(model, tmp_path / f"model{i}")) for i, model in enumerate(models)]
    data = [rows_of(tmp_path, i) for i in range(2)]
    inputs = [{"model": folder, "data": rows} for folder, rows in zip(folders, data, strict=True)]
    spec = {"merge_method": "regmean", "models": inputs, "parameters": {"alpha": 0.7, "ridge": 0}}
    merge(spec, tmp_path / "out", quiet=True)
    grams = [inner_products(*of_one) for of_one in zip(models, folders, data, strict=True)]
    states = [load_file(Path(folder) / "model.safetensors") for folder in folders]
    linear = 0
    for name, got in load_file(tmp_path / "out" / "model.safetensors").items():
        a, b = (state[name].double() for state in states)
        layer = name.removesuffix(".weight")
        if not name.endswith(".weight") or layer not in grams[0] or a.ndim != 2:
            expected = (a + b) / 2
        else:
            linear += 1
            g, h = (0.7 * of_one[layer] + 0.3 * of_one[layer].diag().diag() for of_one in grams)
            a, b = (a, b) if kind == "gpt2" else (a.T, b.T)
            expected = torch.linalg.solve(g + h, g @ a + h @ b)
            expected = expected if kind == "gpt2" else expected.T
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert linear == (15 if kind == "llama" else 8)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (1, 400), (400, 1)])
def test_memory_is_bounded_as_declared(shape, transposed):
    loaded, models = load_method("regmean"), 3
    width = shape[0 if transposed else 1]
    x = RNG.standard_normal((models, *shape)).astype(np.float32)
    tensor = Arrays(x, "tensor")
    tensor.statistics = Measured(np.stack([a.T @ a for a in RNG.standard_normal((models, 500, width))]))
    tensor.statistics.transposed = transposed
    given = settings("regmean", {}, models)
    tracemalloc.start()
    loaded.combine(tensor.x, given, loaded.prepare(tensor, given), 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= loaded.memory(shape, models)
