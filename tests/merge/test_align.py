"""Alignment: permutations that leave a model's function alone, and the search for those that match another model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests import tiny
from toolkit.checkpoints.adapters import open_adapter
from toolkit.checkpoints.deltas import CHUNK, AdaptedCheckpoint, AdapterDelta, chunks
from toolkit.checkpoints.reader import Checkpoint, MemoryCheckpoint, open_checkpoint
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.merge.align.axes import RESIDUAL, Axis, Group, Part, Permutation, Symmetry, symmetry_of
from toolkit.merge.align.barrier import Line, walk
from toolkit.merge.align.singular import singular_alignment
from toolkit.merge.align.view import PermutedCheckpoint
from toolkit.merge.align.weight_matching import align, compare, solve, worth
from toolkit.models.load import quiet_transformers

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {"head_dim": 4, "qk_layernorm": True},
    "phi3": {"head_dim": 4, "original_max_position_embeddings": 64},
    "olmo": {"head_dim": 4},
    "olmo2": {},
    "granite": {},
    "starcoder2": {"head_dim": 4},
    "stablelm": {"head_dim": 4},
    "cohere": {},
    "glm": {},
    "exaone4": {},
    "nemotron": {"head_dim": 4},
    "smollm3": {},
    "gpt_neox": {"head_dim": 4},
    "opt": {"head_dim": 4, "ffn_dim": 20, "word_embed_proj_dim": 24, "num_key_value_heads": None},
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_inner": 20, "n_positions": 32},
}


def family(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Make a small float64 model of a family with all of its weights random, norms and biases among them."""
    own = FAMILIES[kind]
    sizes = {"vocab_size": SIZES["vocab_size"]} | {k: SIZES[k] for k in SIZES if k.endswith("token_id")}
    with quiet_transformers():
        config = AutoConfig.for_model(kind, **((sizes if kind == "gpt2" else SIZES) | own | changes))
        model = AutoModelForCausalLM.from_config(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(1 + 0.3 * noise if "norm" in name or "ln_" in name else 0.3 * noise)
    return model


def random_permutations(symmetry: Symmetry, seed: int) -> dict[str, Permutation]:
    """Draw one of every group; query heads only among those that share a key-value head."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, group in symmetry.groups.items():
        blocks = generator.permutation(group.size // group.shared)
        found[name] = np.concatenate([b * group.shared + generator.permutation(group.shared) for b in blocks])
    return found


def permuted(model: PreTrainedModel, seed: int, without: str | None = None) -> PermutedCheckpoint:
    checkpoint = open_checkpoint(model)
    symmetry = symmetry_of(checkpoint)
    chosen = random_permutations(symmetry, seed)
    chosen.pop(without or "", None)
    return PermutedCheckpoint(checkpoint, symmetry, chosen)


def as_model(checkpoint: Checkpoint, like: PreTrainedModel) -> PreTrainedModel:
    state = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    with quiet_transformers():
        copy = type(like).from_pretrained(None, config=like.config, state_dict=state, dtype=like.dtype)
    return copy.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(14).reshape(2, 7) * 5 % SIZES["vocab_size"]
    with torch.inference_mode():
        return model(input_ids=ids).logits


def arrays(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.tensor(name).double().numpy() for name in checkpoint.tensors}


def all_permutations(group: Group) -> Iterator[Permutation]:
    """Yield every permutation of a group that keeps its blocks together."""
    inner = list(itertools.permutations(range(group.shared)))
    blocks = group.size // group.shared
    for order in itertools.permutations(range(blocks)):
        for inside in itertools.product(inner, repeat=blocks):
            yield np.array([b * group.shared + i for b, p in zip(order, inside, strict=True) for i in p])


def inner_product(a: Checkpoint, b: Checkpoint) -> float:
    x, y = arrays(a), arrays(b)
    return sum(float((x[name] * y[name]).sum()) for name in x)


@pytest.mark.system("weight_matching")
@pytest.mark.parametrize("kind", FAMILIES)
def test_permuted_model_computes_the_same(kind):
    model = family(kind)
    view = permuted(model, seed=3)
    assert {name.rpartition(".")[2] for name in view.permutations} == {"residual", "mlp", "attention"}
    copy = as_model(view, model)
    assert not all(torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters(), strict=True))
    # The weights are float64, but most families' norms and rotary embeddings compute in float32.
    torch.testing.assert_close(logits(copy), logits(model), rtol=0, atol=5e-6 * float(logits(model).abs().max()))


@pytest.mark.system("weight_matching")
def test_permutations_keep_singular_values():
    model = tiny.llama()
    view = permuted(model, seed=1)
    for name, info in view.tensors.items():
        if len(info.shape) == 2:
            before, after = (
                np.linalg.svd(c.tensor(name).double().numpy(), compute_uv=False) for c in (view.inner, view)
            )
            np.testing.assert_allclose(after, before, rtol=1e-12)


@pytest.mark.system("weight_matching")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_permutation_is_recovered(tied, seed):
    model = tiny.llama(seed, tie_word_embeddings=tied, num_attention_heads=6, num_key_value_heads=3, hidden_size=48)
    other = permuted(model, seed=10 + seed)
    found = align(open_checkpoint(model), other, seed=seed)
    assert set(found.permutations) == set(other.permutations)
    for name, planted in other.permutations.items():
        np.testing.assert_array_equal(planted[found.permutations[name]], np.arange(len(planted)))
    for name in found.view.tensors:
        assert found.view.read_raw(name).tobytes() == other.inner.read_raw(name).tobytes()
    assert ("lm_head.weight" in found.view.tensors) is not tied
    assert torch.equal(found.view.tensor("lm_head.weight"), model.lm_head.weight)
    assert found.distances[0] > 0.5
    assert found.distances[1] == 0
    assert len(found.objective) == 3, "the start found it all, a sweep confirmed it"
    assert min(found.moved.values()) > 0.3


def test_planted_permutation_of_gpt2_is_recovered_without_its_embeddings_help():
    model = family("gpt2").float()
    other = permuted(model, seed=4, without=RESIDUAL)
    found = align(open_checkpoint(model), other, residual=False)
    assert RESIDUAL not in found.permutations
    assert found.distances[1] == 0
    assert len(found.objective) == 4, "solved in one sweep, seen to be so in a second"


def test_models_of_one_base_stay_as_they_are():
    model = tiny.llama()
    found = align(open_checkpoint(model), open_checkpoint(tiny.tuned(model, 1)))
    assert set(found.moved.values()) == {0.0}
    assert found.objective[0] == found.objective[-1]
    assert found.distances[0] == found.distances[1] > 0


def test_start_that_the_vocabulary_misleads_is_not_kept():
    """Features that only the embeddings have in another order: the layers say better where they belong."""
    small = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = tiny.llama(**small)
    state = dict(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name].flip(1)
    found = align(open_checkpoint(model), memory(state, **small))
    assert found.objective[0] == found.objective[1] == found.objective[-1]
    assert set(found.moved.values()) == {0.0}


@pytest.mark.system("weight_matching")
@pytest.mark.parametrize("residual", [True, False])
def test_objective_never_falls_and_is_what_it_says(residual):
    # So few tokens leave the residual stream unsettled: several sweeps are needed.
    small = {"vocab_size": 16, "hidden_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    reference, other = (open_checkpoint(tiny.llama(seed, **small)) for seed in (0, 1))
    whole = align(reference, other, seed=5, residual=residual)
    assert len(whole.objective) > (5 if residual else 2)
    assert (np.diff(whole.objective) >= 0).all()
    assert whole.objective[-1] == whole.objective[-2]
    assert whole.objective[0] == pytest.approx(inner_product(reference, other), rel=1e-6)
    for sweeps in range(1, len(whole.objective) - 1):
        part = align(reference, other, seed=5, sweeps=sweeps, residual=residual)
        assert list(part.objective) == list(whole.objective[: sweeps + 2])
        assert part.objective[-1] == pytest.approx(inner_product(reference, part.view), rel=1e-6)
    squares = [sum(float(np.square(x).sum()) for x in arrays(c).values()) for c in (reference, other)]
    for objective, distance in zip((whole.objective[0], whole.objective[-1]), whole.distances, strict=True):
        assert distance == pytest.approx(np.sqrt((sum(squares) - 2 * objective) / squares[0]), rel=1e-6)
    assert whole.distances[1] < whole.distances[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "gpt_neox", "olmo2"])
def test_result_is_the_best_permutation_of_every_group_given_the_others(kind):
    """Against brute force over all permutations of each group, in float64 over whole models."""
    small = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 8,
        "intermediate_size": 5,
        "head_dim": 2,
    }
    gpt2 = {"n_embd": 4, "n_head": 4, "n_layer": 1, "n_inner": 5}
    changes = gpt2 if kind == "gpt2" else small | {"num_hidden_layers": 1}
    reference, other = (open_checkpoint(family(kind, seed, **changes)) for seed in (0, 1))
    found = align(reference, other, seed=2)
    reached = inner_product(reference, found.view)
    for name, group in found.view.symmetry.groups.items():
        best = -np.inf
        if group.size > 5:
            continue  # 40,320 permutations of eight features
        for candidate in all_permutations(group):
            view = PermutedCheckpoint(other, found.view.symmetry, found.view.permutations | {name: candidate})
            best = max(best, inner_product(reference, view))
        assert reached == pytest.approx(best, rel=1e-6), name


@pytest.mark.parametrize("shared", [1, 2, 3])
def test_assignment_against_all_permutations(shared):
    generator = np.random.default_rng(shared)
    group = Group("heads", 6, shared)
    assert len(list(all_permutations(group))) == {1: 720, 2: 48, 3: 72}[shared]
    for _ in range(5):
        gains = {1: generator.normal(size=(6, 6)), shared: generator.normal(size=(6 // shared,) * 2)}
        values = {}
        for p in all_permutations(group):
            heads = sum(gains[1][i, p[i]] for i in range(6))
            keys = sum(gains[shared][i, p[i * shared] // shared] for i in range(6 // shared))
            values[tuple(p)] = heads + (keys if shared > 1 else 0)
        found = solve(group, gains)
        assert tuple(found) == max(values, key=lambda p: values[p])
        assert worth(group, gains, found) == pytest.approx(values[tuple(found)], rel=1e-12)


def test_same_seed_gives_the_same_permutations():
    reference, other = (open_checkpoint(tiny.llama(seed)) for seed in (0, 1))
    first, second = (align(reference, other, seed=7) for _ in range(2))
    assert first.objective == second.objective
    for name, permutation in first.permutations.items():
        np.testing.assert_array_equal(permutation, second.permutations[name])


class Counting(MemoryCheckpoint):
    """Notes how much was asked for."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__(state, {}, "counting")
        self.asked: list[int] = []

    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        raw = super().read_raw(name, start, stop)
        self.asked.append(len(raw) // (self.info(name).dtype.bits // 8))
        return raw


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_view_by_chunks_equals_indexing_of_the_whole(dtype, whole_rows):
    rows, columns = Axis(Group("rows", 100), (Part(3),)), Axis(Group("columns", 350), (Part(1), Part(1)))
    long = Axis(Group("long", 70_000))
    axes = {
        "both": (rows, columns),
        "rows": (rows, None),
        "columns": (None, columns),
        "long rows": (None, long),
        "vector": (long,),
        "left alone": (None, None),
    }
    shapes = {"both": (300, 700), "rows": (300, 11), "columns": (200, 700), "long rows": (3, 70_000)}
    shapes |= {"vector": (70_000,), "left alone": (4, 5)}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    inner = Counting(state)
    symmetry = Symmetry({}, axes)
    groups = [rows.group, columns.group, long.group]
    random = np.random.default_rng(1)
    view = PermutedCheckpoint(inner, symmetry, {group.name: random.permutation(group.size) for group in groups})
    blocks = (view.permutations["rows"][:, None] * 3 + np.arange(3)).reshape(-1)
    halves = np.concatenate([view.permutations["columns"], 350 + view.permutations["columns"]])
    order = {rows: blocks, columns: halves, long: view.permutations["long"], None: slice(None)}
    for name, value in state.items():
        expected = value.float().numpy()
        for dimension, axis in enumerate(axes[name]):
            expected = np.moveaxis(np.moveaxis(expected, dimension, 0)[order[axis]], 0, dimension)
        inner.asked.clear()
        got = np.full(expected.size, np.nan, np.float32)
        raw = bytearray()
        for start, stop in chunks(value.shape, whole_rows=whole_rows):
            view.read(name, start, stop, got[start:stop])
            raw += view.read_raw(name, start, stop).tobytes()
        np.testing.assert_array_equal(got.reshape(expected.shape), expected)
        assert torch.frombuffer(raw, dtype=dtype).float().numpy().tobytes() == expected.tobytes()
        cut = value.shape[-1] > CHUNK and not (whole_rows and value.ndim > 1)  # then a chunk needs parts of two rows
        assert max(inner.asked) <= (2 * value.shape[-1] if cut else max(CHUNK, value.shape[-1]))
        assert sum(inner.asked) <= 2 * value.numel() * (3 if cut else 1), "both ways of reading take what they need"


def test_view_of_a_model_with_an_adapter(base, loras):
    inner = AdaptedCheckpoint(AdapterDelta(open_checkpoint(base), open_adapter(loras["dora"])))
    symmetry = symmetry_of(inner)
    view = PermutedCheckpoint(inner, symmetry, random_permutations(symmetry, 0))
    for name, info in view.tensors.items():
        whole, got = np.empty(info.count, np.float32), np.empty(info.count, np.float32)
        inner.read(name, 0, info.count, whole)
        view.read(name, 0, info.count, got)
        expected = whole.reshape(info.shape)
        for dimension, axis in enumerate(symmetry.axes[name]):
            if axis:
                expected = expected.take(axis.order(view.permutations[axis.group.name]), dimension)
        np.testing.assert_allclose(got.reshape(info.shape), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.system("weight_matching")
def test_singular_alignment_is_its_definition():
    reference, other = tiny.llama(0), tiny.llama(1)
    checkpoint, moved = open_checkpoint(reference), permuted(reference, 2)
    assert singular_alignment(checkpoint, moved.inner, moved)[0] == pytest.approx(1, rel=1e-6)
    assert singular_alignment(checkpoint, moved)[0] < 0.5
    top = bottom = 0.0
    for name, value in reference.state_dict().items():
        if value.ndim == 2 and "layers" in name:
            (u, s, v), (x, t, y) = (
                np.linalg.svd(m.state_dict()[name].double().numpy(), False) for m in (reference, other)
            )
            top += float((np.outer(s, t) * (u.T @ x) * (v @ y.T)).sum())
            bottom += float(s @ t)
    assert singular_alignment(checkpoint, open_checkpoint(other))[0] == pytest.approx(top / bottom, abs=1e-7)


@pytest.mark.system("weight_matching")
def test_barrier_along_a_line_of_known_losses():
    """The loss is the square of one weight: `((1 - a) x + a y)^2` lies below its chord by `a (1 - a) (x - y)^2`."""

    def square(model: torch.nn.Module) -> float:
        return float(model.get_parameter("weight").detach()) ** 2

    start, end = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        start.weight.fill_(-1)
        end.weight.fill_(3)
    saved = {name: value.clone() for name, value in start.state_dict().items()}
    line = walk(start, end, (0, 0.25, 0.5, 1), square)
    assert list(line.losses) == pytest.approx([1, 0, 1, 9])
    assert line.barriers == pytest.approx([0, -3, -4, 0])
    assert line.highest == 0
    still = walk(start, end, (0, 0.5, 1), square, among=lambda name: name == "bias")
    assert list(still.losses) == [1, 1, 1]
    with pytest.raises(ZeroDivisionError):
        walk(start, end, (0, 0.5, 1), lambda model: 1 / 0)
    for name, value in start.state_dict().items():
        assert torch.equal(value, saved[name]), "the model is given back as it was"
    assert Line((0, 0.5, 1), (1, 5, 3)).highest == pytest.approx(3)
    with pytest.raises(UnsupportedError, match="weight differs in more than its values"):
        walk(start, torch.nn.Linear(2, 1), (0, 1), lambda model: 0)


def memory(state: dict[str, torch.Tensor], **changes: Any) -> MemoryCheckpoint:
    config = tiny.llama_config().to_dict() | changes
    return MemoryCheckpoint(state, config, "memory")


def test_what_cannot_be_aligned_is_one_clear_error():
    state = dict(tiny.llama().state_dict())
    plain = memory(state)
    experts = "model.layers.0.mlp.experts.0.up_proj.weight"
    cases = {
        f"{experts} is not a tensor of an architecture that can be aligned": memory(
            {**state, experts: torch.ones(2, 2)}
        ),
        "does not say how many attention heads": MemoryCheckpoint(state, {}, "memory"),
        "heads with ALiBi cannot be permuted": memory(state, alibi=True),
        "5 attention heads for 2 key-value heads": memory(state, num_attention_heads=5),
        r"q_proj.weight is \[48, 48\]; expected 24": memory(state, head_dim=6),
        "is I8": memory({**state, "model.norm.weight": torch.ones(48, dtype=torch.int8)}),
        r"up_proj.weight is \[7, 48\]; expected 96 where it has 7": memory(
            {**state, "model.layers.1.mlp.up_proj.weight": torch.ones(7, 48)}
        ),
        "vision.layers.0.self_attn.q_proj.weight is not a tensor": memory(
            {**state, "vision.layers.0.self_attn.q_proj.weight": torch.ones(48, 48)}
        ),
    }
    for message, checkpoint in cases.items():
        with pytest.raises(UnsupportedError, match=message):
            symmetry_of(checkpoint)
    heads = memory(state, num_attention_heads=8, num_key_value_heads=4, head_dim=6)
    rows = memory({**state, "model.embed_tokens.weight": torch.ones(300, 48)})
    fewer = memory({name: value for name, value in state.items() if "layers.2" not in name})
    for other, message in (
        (heads, "q_proj.weight is cut into other heads"),
        (rows, r"model.embed_tokens.weight is \[300, 48\], not \[262, 48\]"),
        (fewer, "memory lacks model.layers.2"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            align(plain, other)
    broken = memory({**state, "model.norm.weight": torch.full((48,), torch.nan)})
    with pytest.raises(CheckpointError, match=r"model.norm.weight: NaN or infinity in memory"):
        align(plain, broken)


def test_head_that_one_model_stores_and_the_other_ties():
    model = tiny.llama(tie_word_embeddings=True)
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    stored = memory({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()})
    symmetry = symmetry_of(stored)
    view = PermutedCheckpoint(stored, symmetry, random_permutations(symmetry, 0))
    found = align(memory(state), view)
    assert found.distances[1] == 0
    assert torch.equal(found.view.tensor("lm_head.weight"), found.view.tensor("model.embed_tokens.weight"))
    assert compare(memory(state), found.view)[1] == 0
