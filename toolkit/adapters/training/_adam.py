"""AdamW whose moments take less memory: in 8 bits, of a low-rank gradient, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.training._base import TrainingMethod
from toolkit.adapters.training._blocks import dequantize, quantize

_FLOOR = 1e-12
"""Least magnitude of a row: one of exactly 0 would lose its direction."""


class AdamParams(TrainingMethod.Params):
    """Parameters of AdamW and of how its moments are kept.

    Attributes:
        beta1: decay of the first moment.
        beta2: decay of the second.
        eps: added to the root of the second.
        bits: of a number in the moments.
        block_size: entries of a block, where they have 8 bits.
        min_8bit_size: moments of fewer entries keep 32 bits.
    """

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    bits: Literal[8, 32] = 32
    block_size: Annotated[int, Field(ge=1)] = 256
    min_8bit_size: Annotated[int, Field(ge=0)] = 4096

    def settings(self) -> dict[str, Any]:
        """Return them as `LeanAdamW` takes them."""
        return {
            "betas": (self.beta1, self.beta2),
            "eps": self.eps,
            "block": self.block_size if self.bits == 8 else None,
            "min_size": self.min_8bit_size,
        }


class LeanMethod(TrainingMethod):
    """A method that brings `LeanAdamW`; a subclass says which parameters it treats how."""

    def __init__(self, params: Any, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self.made: Optimizer | None = None

    def groups(self, model: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the groups of the optimizer, with settings of their own."""
        return groups

    def optimizer(self, model: nn.Module, groups: list[dict[str, Any]], learning_rate: float) -> Optimizer:
        """Return the optimizer."""
        self.made = LeanAdamW(self.groups(model, groups), learning_rate, **self.params.settings())
        return self.made

    def record(self) -> dict[str, Any]:
        """Return what it keeps of the parameters."""
        states = [] if self.made is None else list(self.made.state.values())
        kept = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        return {"optimizer_bytes": sum(v.numel() * v.element_size() for v in kept)}


class LeanAdamW(Optimizer):
    """AdamW; with 32 bits and without a rank its steps are those of `torch.optim.AdamW`, to the bit.

    Args:
        params: parameters, or groups, each of which may have its own of the settings below.
        lr: learning rate.
        weight_decay: decoupled.
        betas: decays of the moments.
        eps: added to the denominator.
        block: entries of a block of 8-bit moments; `None` keeps 32 bits.
        min_size: moments of fewer entries keep 32 bits.
        rank: of the subspace of a matrix's gradients that moments are kept in; `None` is all of it.
        gap: steps from one choice of a subspace to the next.
        scale: of what comes back from a subspace.
        normalised: train the magnitude and the direction of each row of a matrix instead of its entries.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        block: int | None = None,
        min_size: int = 4096,
        rank: int | None = None,
        gap: int = 200,
        scale: float = 1.0,
        normalised: bool = False,
    ) -> None:
        kept = {"betas": betas, "eps": eps, "block": block, "min_size": min_size}
        lower = {"rank": rank, "gap": gap, "scale": scale, "normalised": normalised}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **kept, **lower})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, self.state[p])
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        gradient = p.grad.to(torch.promote_types(p.dtype, torch.float32))  # pyright: ignore[reportOptionalMemberAccess]
        if not state:
            state["step"] = 0
            if group["normalised"] and (lengths := p.to(gradient.dtype).norm(dim=1)).all():  # zeros point nowhere
                state |= {"magnitude": lengths, "length": lengths.clone()}
        state["step"] += 1
        decay = 1 - group["lr"] * group["weight_decay"]
        if "magnitude" in state:
            _step_normalised(p, gradient, decay, group, state)
            return
        p.mul_(decay)
        _move(p, gradient, group, state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; codes stay bytes, which torch would turn into the type of their parameter."""
        super().load_state_dict(state_dict)
        own = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, own, strict=True):
            saved = state_dict["state"].get(number, {})
            self.state[p] = {k: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in saved.items()}


def _move(x: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    """Take Adam's step along a gradient, in its subspace where there is one."""
    rank, (beta1, _), step = group["rank"], group["betas"], state["step"]
    size = group["lr"] / (1 - beta1**step)
    if rank is None or rank >= min(gradient.shape):
        first, root = _moments("", gradient, group, state)
        x.addcdiv_(first, root, value=-size)
        return
    if (step - 1) % group["gap"] == 0:
        state["basis"] = basis_of(gradient, rank)
    first, root = _moments("", project(gradient, state["basis"]), group, state)
    x.add_(lift(first / root, state["basis"], gradient.shape), alpha=-size * group["scale"])


def _step_normalised(p: Tensor, gradient: Tensor, decay: float, group: dict[str, Any], state: dict[str, Any]) -> None:
    """Take a step in the magnitudes and the directions of rows, `magnitude * v / |v|`; of `v` only `|v|` is kept."""
    magnitude, length = state["magnitude"], state["length"]
    unit = nn.functional.normalize(p.to(gradient.dtype), dim=1, eps=_FLOOR) * magnitude.sign()[:, None]
    of_magnitude, of_direction = normalised_gradients(gradient, unit, magnitude, length)
    first, root = _moments("magnitude_", of_magnitude, group, state)
    magnitude.mul_(decay).addcdiv_(first, root, value=-group["lr"] / (1 - group["betas"][0] ** state["step"]))
    magnitude.copy_(torch.where(magnitude.abs() < _FLOOR, _FLOOR, magnitude))
    direction = unit.mul_(length[:, None])
    _move(direction, of_direction, group, state)
    length.copy_(direction.norm(dim=1))
    p.copy_(direction * (magnitude / length)[:, None])


def normalised_gradients(gradient: Tensor, unit: Tensor, magnitude: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to the magnitudes and the directions of rows.

    Args:
        gradient: with respect to the matrix, `[M, N]`.
        unit: its rows' directions, of length 1.
        magnitude: `[M]`.
        length: of the direction that is trained, `[M]`.
    """
    along = (gradient * unit).sum(1)
    return along, (magnitude / length)[:, None] * (gradient - unit * along[:, None])


def _moments(prefix: str, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Update the moments in a state; return the first, and the root of the second, corrected, with epsilon added."""
    beta1, beta2 = group["betas"]
    first = _read(state, f"{prefix}exp_avg", gradient, group["block"], signed=True)
    second = _read(state, f"{prefix}exp_avg_sq", gradient, group["block"], signed=False)
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    block = group["block"] if gradient.numel() >= group["min_size"] else None
    _write(state, f"{prefix}exp_avg", first, block, signed=True)
    _write(state, f"{prefix}exp_avg_sq", second, block, signed=False)
    root = (second.sqrt() / (1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
    return first, root


def _read(state: dict[str, Any], name: str, like: Tensor, block: int | None, *, signed: bool) -> Tensor:
    if f"{name}_codes" in state:
        assert block is not None
        flat = dequantize(state[f"{name}_codes"], state[f"{name}_largest"], block, signed=signed)
        return flat.view(like.shape).to(like.dtype)
    return state[name] if name in state else torch.zeros_like(like)


def _write(state: dict[str, Any], name: str, value: Tensor, block: int | None, *, signed: bool) -> None:
    if block is None:
        state[name] = value
        return
    state[f"{name}_codes"], state[f"{name}_largest"] = quantize(value, block, signed=signed)


def basis_of(gradient: Tensor, rank: int) -> Tensor:
    """Return the leading singular directions of a matrix `[M, N]` on its shorter side, `[min(M, N), rank]`."""
    short = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    return torch.linalg.svd(short, full_matrices=False).U[:, :rank].contiguous()


def project(gradient: Tensor, basis: Tensor) -> Tensor:
    """Return the coordinates of a matrix in a basis of its shorter side: `[rank, N]`, or `[M, rank]`."""
    return basis.T @ gradient if gradient.shape[0] <= gradient.shape[1] else gradient @ basis


def lift(coordinates: Tensor, basis: Tensor, shape: torch.Size) -> Tensor:
    """Return the matrix of a shape that coordinates stand for."""
    return basis @ coordinates if shape[0] <= shape[1] else coordinates @ basis.T


def split_groups(
    groups: Iterable[dict[str, Any]], chosen: Iterable[Tensor], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Give some parameters settings of their own, in groups of their own."""
    ids = {id(p) for p in chosen}
    found = []
    for group in groups:
        parts = [p for p in group["params"] if id(p) in ids], [p for p in group["params"] if id(p) not in ids]
        found += [{**group, **settings, "params": parts[0]}, {**group, "params": parts[1]}]
    return [group for group in found if group["params"]]


def linear_weights(model: Any) -> list[Tensor]:
    """Return the weights of all linear layers but the head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
