"""LQ-LoRA: each weight as a quantised part, which is fixed, and a low-rank part, which is trained.

`W = Q + B A`, found by turns: `B A` is the best approximation of rank r of `W - Q`, and `Q` the quantised `W - B A`,
from `Q = 0` until the error rises; the best of all turns is taken. How many bits each matrix gets, and in blocks of
which size, is chosen for the smallest error of all within a budget, by an integer programme. With `fisher`, errors
count by how much the loss would notice: `|D (W - Q - B A) E|`, with the roots of the row and column means of the
squared gradients on the diagonals of D and E.

Guo et al., "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning", 2024,
arXiv:2311.12023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from toolkit.adapters.methods._base import AdapterConfig, Site, register
from toolkit.adapters.methods._normal_float import dequantize, quantize, storage_bits
from toolkit.adapters.methods._replace import ReplacedLinear
from toolkit.adapters.methods._sites import target_weights

FORMATS = tuple((bits, block) for bits in (2, 3, 4, 8) for block in (32, 64, 256))
"""Bits and block sizes that a matrix may get."""


@dataclass
class LqLoraConfig(AdapterConfig):
    """LQ-LoRA.

    Attributes:
        r: rank of the trained part.
        budget: bits per entry of the quantised parts of all adapted matrices together, scales included.
        iterations: turns of the decomposition, at most.
        fisher: safetensors file of squared gradients, as `squared_gradients` writes it; by default every entry counts
            alike.
        formats: bits and block size of every matrix, by module; found where it is empty.
    """

    r: int = 16
    budget: float = 4.25
    iterations: int = 20
    fisher: str | None = None
    formats: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1 or self.iterations < 1:
            raise ValueError("r and iterations are at least 1")

    def resolve(self, model: nn.Module) -> None:
        """Choose the formats."""
        if self.formats:
            return
        weights = dict(target_weights(self, model))
        sizes = np.array([[storage_bits(w.numel(), *f) for f in FORMATS] for w in weights.values()], float)
        budget = self.budget * sum(w.numel() for w in weights.values())
        if sizes.min(axis=1).sum() > budget:
            least = sizes.min(axis=1).sum() / sum(w.numel() for w in weights.values())
            raise ValueError(f"budget is at least {least:.3f} bits here, not {self.budget}")
        errors = [
            [self.decomposed(key, weight, *format_).error ** 2 for format_ in FORMATS]
            for key, weight in weights.items()
        ]
        chosen = choose(sizes, np.array(errors), budget)
        self.formats = {key: list(FORMATS[i]) for key, i in zip(weights, chosen, strict=True)}

    def decomposed(self, key: str, weight: Tensor, bits: int, block: int) -> Decomposition:
        """Decompose the weight of a module in a format."""

        def rounded(x: Tensor) -> Tensor:
            return dequantize(*quantize(x, bits, block), tuple(x.shape), bits, block)

        return decompose(weight, self.r, rounded, self.iterations, self._importance(key))

    def _importance(self, key: str) -> Tensor | None:
        """Return the squared gradients of a module's weight, `[out, in]`, where there are some."""
        if self.fisher is None:
            return None
        with safe_open(self.fisher, framework="pt") as file:
            return file.get_tensor(key) if key in set(file.keys()) else None


class Decomposition(NamedTuple):
    """A weight as `rest + b @ a`.

    Attributes:
        a: `[r, in]`.
        b: `[out, r]`.
        rest: what was quantised, `[out, in]`, before it was.
        error: Frobenius norm of what is left, weighted where entries have weights.
    """

    a: Tensor
    b: Tensor
    rest: Tensor
    error: float


def decompose(
    weight: Tensor,
    rank: int,
    rounded: Callable[[Tensor], Tensor],
    iterations: int,
    importance: Tensor | None = None,
) -> Decomposition:
    """Split a weight `[out, in]` into a low-rank part and one that is rounded.

    Args:
        weight: float32 or float64.
        rank: of the low-rank part.
        rounded: returns what a matrix is after it was quantised.
        iterations: turns, at most.
        importance: squared gradients, `[out, in]`.

    Returns:
        The best of all turns.
    """
    rows, columns = _scales(weight, importance)
    quantised, best = torch.zeros_like(weight), None
    for _ in range(iterations):
        u, s, v = torch.linalg.svd(rows * (weight - quantised) * columns, full_matrices=False)
        root = s[:rank].sqrt()
        b, a = u[:, :rank] * root / rows, root[:, None] * v[:rank] / columns
        rest = weight - b @ a
        quantised = rounded(rest)
        error = float((rows * (rest - quantised) * columns).norm())
        if best is not None and error >= best.error:
            break
        best = Decomposition(a, b, rest, error)
    assert best is not None
    return best


def _scales(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the roots of the row and column means, `[out, 1]` and `[1, in]`, their geometric means 1."""
    if importance is None:
        return weight.new_ones(len(weight), 1), weight.new_ones(1, weight.shape[1])
    found = []
    for axis in (1, 0):
        means = importance.to(weight).mean(axis, keepdim=True)
        scale = means.clamp_min(means.max() * 1e-6).sqrt()  # what has no gradient counts little, but counts
        found.append(scale / scale.log().mean().exp())
    return found[0], found[1]


def choose(sizes: np.ndarray, errors: np.ndarray, budget: float) -> list[int]:
    """Choose one format for each matrix, for the smallest sum of errors.

    Args:
        sizes: `[matrices, formats]`.
        errors: likewise.
        budget: most that the sizes may sum to; at least the sum of the smallest.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    count, formats = sizes.shape
    one_each = np.kron(np.eye(count), np.ones(formats))
    found = milp(
        (errors / errors.max() if errors.max() else errors).ravel(),
        integrality=np.ones(count * formats),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes.ravel()[None] / budget, -np.inf, 1),
        ],
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None, found.message
    return [int(i) for i in found.x.reshape(count, formats).argmax(1)]


class LqLoraLinear(ReplacedLinear):
    """A linear of a fixed quantised weight and two trained factors."""

    TRAINED = ("a", "b")
    STORED = ("codes", "scales")

    def start(self, config: LqLoraConfig, site: Site) -> Mapping[str, Tensor]:
        """Decompose the weight."""
        inputs, outputs = self.sizes
        self.key = site.key
        bits, block = config.formats[site.key]
        if config.inference_mode:  # they will be read
            empty = torch.zeros(outputs, inputs)
            codes, scales = quantize(empty, bits, block)
            rank = min(config.r, inputs, outputs)
            return {"a": empty[:rank], "b": empty[:, :rank].contiguous(), "codes": codes, "scales": scales}
        found = config.decomposed(site.key, self.base_weight, bits, block)
        codes, scales = quantize(found.rest, bits, block)
        return {"a": found.a.contiguous(), "b": found.b.contiguous(), "codes": codes, "scales": scales}

    def replaces(self, adapter: str) -> bool:
        """Every linear is replaced."""
        return True

    def quantised(self, adapter: str) -> Tensor:
        """Return Q, `[out, in]` float32."""
        inputs, outputs = self.sizes
        codes, scales = self.tensor(adapter, "codes"), self.tensor(adapter, "scales")
        bits, block = self.configs[adapter].formats[self.key]
        return dequantize(codes, scales, (outputs, inputs), bits, block)

    def product(self, adapter: str, x: Tensor) -> Tensor:
        """Return `(Q + B A) x`."""
        low = functional.linear(functional.linear(x, self.tensor(adapter, "a")), self.tensor(adapter, "b"))
        return functional.linear(x, self.quantised(adapter).to(x.dtype)) + low

    def whole(self, adapter: str) -> Tensor:
        """Return `Q + B A`."""
        return self.quantised(adapter) + self.tensor(adapter, "b") @ self.tensor(adapter, "a")


def squared_gradients(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean squared gradient of every linear's weight, `[out, in]`, by module: what `fisher` reads.

    Args:
        model: a causal language model; its gradients are cleared.
        batches: inputs with labels.
    """
    linears = {key: m for key, m in model.named_modules() if isinstance(m, nn.Linear)}
    totals = {key: torch.zeros_like(m.weight, dtype=torch.float32) for key, m in linears.items()}
    count = 0
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        count += 1
        for key, module in linears.items():
            if module.weight.grad is not None:
                totals[key] += module.weight.grad.float().square()
    model.zero_grad()
    return {key: (total / max(count, 1)).cpu() for key, total in totals.items()}


register("lq_lora", LqLoraConfig, LqLoraLinear)
