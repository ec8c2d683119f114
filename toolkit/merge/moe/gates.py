"""What the routers hold: for every layer and expert a vector, with which a token's hidden state is multiplied.

A token goes to the experts whose vectors have the largest products with what enters the layer's mixture. So the
vector of an expert is the direction in which its prompts lie: the mean of theirs, less that of prompts which it
should not get, at length 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.deltas import AdaptedCheckpoint, chunks
from toolkit.checkpoints.dtypes import Floats
from toolkit.checkpoints.reader import Checkpoint
from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import Problem, ToolkitError
from toolkit.merge.moe.models import EMBEDDINGS
from toolkit.merge.moe.noise import normals, uniforms
from toolkit.merge.moe.spec import GateMode, MoeSpec
from toolkit.merge.nested import MergedCheckpoint
from toolkit.merge.random import Draws
from toolkit.progress import Progress, track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toolkit.merge.moe.plan import Plan

Rows = list[list[int]]
Pool = Callable[[Rows], NDArray[np.float64]]
"""Turns prompts into a vector for each layer, `[L, H]`."""

SMALLEST = 1e-8
"""Length below which a vector is not brought to length 1."""


@dataclass(frozen=True)
class Prompts:
    """Token ids of an expert's prompts."""

    positive: Rows
    negative: Rows


def encode_prompts(spec: MoeSpec, base: Checkpoint, *, gated_shared: bool) -> tuple[list[Prompts], list[Problem]]:
    """Tokenize the prompts of every gated expert with the base's tokenizer."""
    if not spec.asks_prompts:
        return [], []
    if base.folder is None:
        return [], [
            Problem("base_model", f"a model in memory brings no tokenizer, which gate_mode {spec.gate_mode} needs")
        ]
    from toolkit.models.load import load_tokenizer

    try:
        tokenizer = load_tokenizer(base.folder)
    except ToolkitError as error:
        return [], [Problem("base_model", str(error))]
    found: list[Problem] = []
    encoded: list[Prompts] = []
    for path, expert in spec.slots():
        if path.startswith("shared") and not gated_shared:
            continue
        sides = [[_ids(tokenizer, text) for text in texts] for texts in expert.prompts]
        for key, rows in zip(("positive_prompts", "negative_prompts"), sides, strict=True):
            for index, row in enumerate(rows):
                fault = _fault(row, base)
                found += [Problem(f"{path}.{key}[{index}]", fault)] if fault else []
        encoded.append(Prompts(*sides))
    return encoded, found


def _fault(row: list[int], base: Checkpoint) -> str | None:
    """Return why the base cannot read a prompt."""
    room, tokens = (
        base.config.get("max_position_embeddings"),
        base.info(EMBEDDINGS).shape[0] if base.has(EMBEDDINGS) else 0,
    )
    if not row:
        return "has no tokens"
    if room and len(row) > room:
        return f"has {len(row)} tokens, but the base has room for {room}"
    if tokens and max(row) >= tokens:
        return f"has the token {max(row)}, but the base embeds {tokens}"
    return None


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt, which begins with the tokenizer's first token, if it has one, once."""
    begin = getattr(tokenizer, "bos_token", None) or ""
    text = text if begin and text.startswith(begin) else begin + text
    return tokenizer.encode(text, add_special_tokens=False)


def make_gates(plan: Plan, *, device: str = "auto", quiet: bool = False) -> Floats:
    """Compute what the routers hold.

    Args:
        plan: of the mixture.
        device: where the base runs, if it must.
        quiet: show no progress.

    Returns:
        `[L, G, H]` float32: experts in the spec's order, then a gated shared expert.
    """
    spec, models = plan.spec, plan.models
    shape = models.num_layers, plan.num_gates, models.base.info(EMBEDDINGS).shape[1]
    if not spec.asks_prompts:
        return _random(spec, shape)
    texts = sum(len(prompts.positive) + len(prompts.negative) for prompts in plan.prompts)
    with track("reading prompts", texts, unit="prompts", quiet=quiet) as progress:
        if spec.gate_mode == "cheap_embed":
            vectors = [_cheap(models.base, prompts, progress) for prompts in plan.prompts]
            return np.broadcast_to(np.stack(vectors)[None], shape).astype(np.float32)
        pool = _hidden(models.base, spec.gate_mode, device, progress)
        return np.stack([_contrast(pool, prompts) for prompts in plan.prompts], axis=1).astype(np.float32)


def alike(gates: Floats) -> tuple[float, int]:
    """Return the largest cosine between the vectors of two experts, `[L, E, H]`, and in which layer it is."""
    unit = _unit(gates.astype(np.float64))
    cosines = unit @ unit.transpose(0, 2, 1)
    cosines[:, np.arange(gates.shape[1]), np.arange(gates.shape[1])] = -1
    largest = cosines.max((1, 2))
    return float(largest.max()), int(largest.argmax())


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), SMALLEST)


def _random(spec: MoeSpec, shape: tuple[int, int, int]) -> Floats:
    """Return standard normal numbers, or uniform ones as a new linear layer has them."""
    layers, count, hidden = shape
    gates = np.empty((layers, count * hidden), np.float32)
    for layer in range(layers):
        draws = Draws(spec.seed, "router", layer)
        if spec.gate_mode == "random":
            gates[layer] = normals(draws, 0, count * hidden)
        else:
            gates[layer] = (2 * uniforms(draws, 0, count * hidden) - 1) / np.sqrt(hidden)
    return gates.reshape(shape)


def _contrast(pool: Pool, prompts: Prompts) -> NDArray[np.float64]:
    """Return the direction from the negative to the positive prompts, `[L, H]`."""
    states = pool(prompts.positive)
    return _unit(states - pool(prompts.negative) if prompts.negative else states)


def _cheap(base: Checkpoint, prompts: Prompts, progress: Progress) -> NDArray[np.float64]:
    """Return the direction of the tokens' embeddings, `[H]`; each side counts alike, however many tokens it has."""

    def pool(rows: Rows) -> NDArray[np.float64]:
        progress.advance(len(rows))
        return _unit(sum((_embedding(base, token) for row in rows for token in row), np.zeros(1)))

    return _contrast(pool, prompts)


def _embedding(base: Checkpoint, token: int) -> NDArray[np.float64]:
    """Read one row of the input embeddings."""
    rows, hidden = base.info(EMBEDDINGS).shape
    # An adapted tensor is computed chunk by chunk, so the chunk that holds the row is read.
    start, stop = next((a, b) for a, b in chunks((rows, hidden)) if a <= token * hidden < b)
    values = np.empty(stop - start, np.float32)
    base.read(EMBEDDINGS, start, stop, values)
    return values[token * hidden - start :][:hidden].astype(np.float64)


def _hidden(base: Checkpoint, mode: GateMode, device: str, progress: Progress) -> Pool:
    """Return what runs prompts through the base and takes the mean of the states that enter its layers or MLPs."""
    from toolkit.models.hidden import module_inputs
    from toolkit.models.load import load_model, pick_device

    with ExitStack() as stack:
        model = load_model(_written(base, stack), device=pick_device(device)).model
    _fold(model, base)
    layers: Any = model.base_model.layers
    modules = [layer.mlp for layer in layers] if mode.startswith("mlp_input") else list(layers)

    def run(rows: Rows) -> NDArray[np.float64]:
        states = module_inputs(model, modules, rows, pool="mean" if mode.endswith("_avg") else "last")
        progress.advance(len(rows))
        return states.double().mean(0).numpy()

    return run


def _written(base: Checkpoint, stack: ExitStack) -> Path:
    """Return a folder from which the base, or what its adapter changes, can be loaded; a merge is written for it."""
    if isinstance(base, MergedCheckpoint):
        from toolkit.merge.run import merge

        folder = Path(stack.enter_context(TemporaryDirectory()))
        return merge(base.plan.spec, folder / "base", card=False, quiet=True).path
    assert base.folder is not None
    return base.folder


def _fold(model: PreTrainedModel, base: Checkpoint) -> None:
    """Put the weights of a base with an adapter into the base that was loaded."""
    import torch

    if not isinstance(base, AdaptedCheckpoint):
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if base.delta.touches(name):
                values = np.empty(parameter.numel(), np.float32)
                for start, stop in chunks(tuple(parameter.shape)):
                    base.read(name, start, stop, values[start:stop])
                parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))
