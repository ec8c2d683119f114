"""A small neural network on the features: one hidden layer, trained until held-out prompts are predicted no better.

`score(x) = W_2 f(W_1 x + b_1) + b_2`, the mean over several networks; one hidden layer as in Hu et al., "RouterBench:
A Benchmark for Multi-LLM Routing System", 2024 (arXiv:2403.12031).

On measured answers it predicts each expert's quality; where prompts were made for experts, which of them. Several
networks from different starts are averaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.routing.examples import Examples
from toolkit.routing.ops import State, Vectors, check_arrays, check_width, log_softmax, size
from toolkit.specs import Spec

if TYPE_CHECKING:
    import torch

SCORES = "quality"
PATIENCE = 8
"""Epochs without a better loss on held-out prompts, after which training ends."""


class Params(Spec):
    """Parameters of `classifier`.

    Attributes:
        hidden: width of the hidden layer.
        networks: that are averaged.
        epochs: at most.
        batch_size: prompts per step.
        learning_rate: of AdamW.
        weight_decay: likewise.
        dropout: of inputs and hidden units, in training.
        held_out: share of the prompts that tells when to end.
        seed: of the starts and draws.
    """

    hidden: Annotated[int, Field(ge=1)] = 128
    networks: Annotated[int, Field(ge=1)] = 3
    epochs: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.15
    seed: Annotated[int, Field(ge=0)] = 0


def fit(vectors: Vectors, examples: Examples, params: Params) -> dict[str, Vectors]:
    """Train the networks; the quality is brought to 0 to 1 first, and back in the scores."""
    low, high = float(np.nanmin(examples.quality)), float(np.nanmax(examples.quality))
    targets = (examples.quality - low) / max(high - low, 1e-9)
    # The root mean square of an input becomes 1, which the learning rate is made for.
    scale = 1 / max(float(np.sqrt(np.square(vectors, dtype=np.float64).mean())), 1e-12)
    trained = [
        _train(vectors * np.float32(scale), targets, examples.labelled, params, params.seed + i)
        for i in range(params.networks)
    ]
    state = {name: np.stack([network[name] for network in trained]) for name in trained[0]}
    settings = np.array([scale, low, high - low, examples.labelled], np.float32)
    return state | {"settings": settings}


def score(vectors: Vectors, state: State) -> Vectors:
    """Return the predicted quality, or the logarithm of each expert's probability; the mean over the networks."""
    check_width(vectors, size(state, "first", 1))
    scale, low, spread, labelled = state["settings"]
    x = vectors * scale
    logits = [
        np.maximum(x @ first + first_bias, 0) @ second + second_bias
        for first, first_bias, second, second_bias in zip(*(state[name] for name in _NAMES), strict=True)
    ]
    if labelled:
        return log_softmax(np.mean([log_softmax(one) for one in logits], axis=0))
    return low + spread * np.mean([1 / (1 + np.exp(-one)) for one in logits], axis=0, dtype=np.float32)


def check(state: State, num_experts: int) -> None:
    """Check that the arrays are all there, finite, and of sizes that fit each other and the experts."""
    count, width, hidden = size(state, "first", 0), size(state, "first", 1), size(state, "first")
    shapes: dict[str, tuple[int, ...]] = {"first": (count, width, hidden), "first_bias": (count, hidden)}
    shapes |= {"second": (count, hidden, num_experts), "second_bias": (count, num_experts), "settings": (4,)}
    check_arrays(state, shapes)


_NAMES = ("first", "first_bias", "second", "second_bias")


def _train(
    vectors: Vectors, targets: NDArray[np.float64], labelled: bool, params: Params, seed: int
) -> dict[str, Vectors]:
    """Train one network; return its best weights, those of linear maps `x @ w + b`."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(vectors))
        count = max(int(len(vectors) * params.held_out), 1)
        x, y = torch.from_numpy(vectors)[order], torch.from_numpy(targets).float()[order]
        network = _network(vectors.shape[1], targets.shape[1], params)
        rate, decay = params.learning_rate, params.weight_decay
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay)
        best, since, kept = np.inf, 0, _weights(network)
        for _ in range(params.epochs):
            network.train()
            for rows in torch.randperm(len(x) - count).split(params.batch_size):
                optimizer.zero_grad()
                _loss(network(x[count:][rows]), y[count:][rows], labelled).backward()
                optimizer.step()
            network.eval()
            with torch.no_grad():
                loss = _loss(network(x[:count]), y[:count], labelled).item()
            since += 1
            if loss < best:
                best, since, kept = loss, 0, _weights(network)
            if since >= PATIENCE:
                break
    return kept


def _network(width: int, num_experts: int, params: Params) -> torch.nn.Sequential:
    from torch import nn

    drop = [nn.Dropout(params.dropout) for _ in range(2)]
    first, second = nn.Linear(width, params.hidden), nn.Linear(params.hidden, num_experts)
    return nn.Sequential(drop[0], first, nn.ReLU(), drop[1], second)


def _loss(logits: Any, targets: Any, labelled: bool) -> Any:
    from torch.nn import functional

    if labelled:
        return functional.cross_entropy(logits, targets)
    known = ~targets.isnan()
    return functional.binary_cross_entropy_with_logits(logits[known], targets[known])


def _weights(network: torch.nn.Sequential) -> dict[str, Vectors]:
    linears: Any = (network[1], network[4])
    parts = [part for linear in linears for part in (linear.weight.T, linear.bias)]
    return {name: part.detach().numpy().copy() for name, part in zip(_NAMES, parts, strict=True)}
