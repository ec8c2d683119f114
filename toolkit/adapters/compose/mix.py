"""The arithmetic of a composition at one module.

A composed module is made of callables that take what the module takes and return what it returns: the module itself,
adapter layers around it, and mixtures of those. Shapes: `T` stands for rows and tokens, `S` for the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.adapters.compose.tree import Fuse

Callee = Callable[..., Any]


class Once:
    """A module, or what is below a mixture, that several adapters read and that runs once for all of them.

    Args:
        below: what it stands for; its attributes are found here too.
    """

    def __init__(self, below: Any) -> None:
        self.base_layer = below
        self._call: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what was remembered of this very call, or run what is below."""
        if self._call is not None and _same(self._call[0], self._call[1], args, kwargs):
            output = self._call[2]
            return with_head(output, head(output).clone())  # some of PEFT's layers add to it in place
        return self.base_layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "base_layer" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.base_layer, name)

    @contextmanager
    def remembered(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Iterator[None]:
        """Answer calls with these arguments by this output inside the block."""
        before, self._call = self._call, (args, kwargs, output)
        try:
            yield
        finally:
            self._call = before


def _same(args: tuple[Any, ...], kwargs: dict[str, Any], given: tuple[Any, ...], named: dict[str, Any]) -> bool:
    if len(args) != len(given) or kwargs.keys() != named.keys():
        return False
    return all(a is b for a, b in zip(args, given, strict=True)) and all(kwargs[key] is named[key] for key in kwargs)


class Mixture:
    """What is below, plus a mixture of the differences that several branches make to its output.

    Args:
        once: what is below; branches are built on it.
        branches: one per source; `once` itself where a source does nothing here.
        rule: mixes the differences.
    """

    def __init__(self, once: Once, branches: Sequence[Callee], rule: Any) -> None:
        self.once, self.branches, self.rule = once, list(branches), rule

    @property
    def base_layer(self) -> Any:
        """What is below."""
        return self.once.base_layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it; where the output is a tuple its first element is mixed."""
        output = self.once.base_layer(*args, **kwargs)
        y = head(output)
        with self.once.remembered(args, kwargs, output):
            outputs = [None if b is self.once else head(b(*args, **kwargs)) for b in self.branches]
        return with_head(output, self.rule(y, outputs))


def head(output: Any) -> Tensor:
    """Return the hidden states of a module's output."""
    return output[0] if isinstance(output, tuple) else output


def with_head(output: Any, value: Tensor) -> Any:
    """Return the output with other hidden states."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


class Weighted:
    """`y + sum_s w_s (o_s - y)` with fixed numbers.

    Args:
        weights: one per source.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.numbers = tuple(weights)

    def weights(self) -> list[Tensor]:
        """Return the weight of each source."""
        return [torch.tensor(value) for value in self.numbers]

    def __call__(self, y: Tensor, outputs: Sequence[Tensor | None]) -> Tensor:
        """Mix `[T, out]`."""
        total = y
        for weight, output in zip(self.numbers, outputs, strict=True):
            if output is not None:
                total = total + weight * (output - y)
        return total


class Rows:
    """Takes from each source an equal part of the rows of a batch."""

    def __call__(self, y: Tensor, outputs: Sequence[Tensor | None]) -> Tensor:
        """Choose among `[B, ...]`.

        Raises:
            ValueError: `B` is no multiple of the sources.
        """
        count, rest = divmod(len(y), len(outputs))
        if rest:
            raise ValueError(f"a batch of {len(y)} rows cannot be shared out among {len(outputs)} parallel adapters")
        parts = [(y if output is None else output)[i * count : (i + 1) * count] for i, output in enumerate(outputs)]
        return torch.cat(parts)


class Scales(nn.Module):
    """ScaLearn: `y + sum_s w_s * (o_s - y)` with trained `w_s`: a vector, or one number where `uniform`.

    No softmax, and nothing that the scales should add up to. Frohmann et al., "ScaLearn: Simple and Highly
    Parameter-Efficient Task Transfer by Learning to Scale", 2023, arXiv:2310.01217.

    Args:
        sources: how many.
        size: entries of the module's output.
        uniform: one number per source.
        start: of every scale.
    """

    def __init__(self, sources: int, size: int, *, uniform: bool, start: float | None) -> None:
        super().__init__()
        value = 1 / sources if start is None else start
        self.scale = nn.Parameter(torch.full((sources, 1 if uniform else size), value))

    def weights(self) -> list[Tensor]:
        """Return the weight of each source, `[out]` or `[1]`."""
        return list(self.scale)

    def forward(self, y: Tensor, outputs: Sequence[Tensor | None]) -> Tensor:
        """Mix `[T, out]`."""
        total = y.to(torch.promote_types(y.dtype, self.scale.dtype))
        for scale, output in zip(self.scale.to(y.device), outputs, strict=True):
            if output is not None:
                total = total + scale * (output - y)
        return total.to(y.dtype)


class Attention(nn.Module):
    """AdapterFusion: `y + sum_s softmax_s(Q y . K d_s) V d_s` with `d_s = o_s - y`; V starts as the identity.

    Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", 2020, arXiv:2005.00247.

    Args:
        size: entries of the module's output.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Parameter(torch.randn(size, size) * size**-0.5) for _ in range(2))
        self.value = nn.Parameter(torch.eye(size))

    def forward(self, y: Tensor, outputs: Sequence[Tensor | None]) -> Tensor:
        """Mix `[T, out]`; a source that does nothing here takes no part."""
        present = [output for output in outputs if output is not None]
        dtype = torch.promote_types(y.dtype, self.value.dtype)
        differences = torch.stack([output.to(dtype) - y.to(dtype) for output in present], dim=-2)
        query, keys = functional.linear(y.to(dtype), self.query), functional.linear(differences, self.key)
        shares = torch.softmax(keys @ query[..., None], dim=-2)
        return (y + (shares * functional.linear(differences, self.value)).sum(-2)).to(y.dtype)


def make_rule(node: Fuse, size: int) -> nn.Module:
    """Return the rule of a node for a module with so many outputs."""
    if node.by == "adapter_fusion":
        return Attention(size)
    return Scales(len(node.nodes), size, uniform="uniform" in node.by, start=node.start)
