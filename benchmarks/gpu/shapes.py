"""The sizes of models that kernels are measured at, and what a decode step of one has to read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama.

    Attributes:
        name: as in tables.
        hidden: features.
        layers: how many.
        heads: of queries.
        kv_heads: of keys and values.
        size: features of a head.
        inner: features between the linears of the MLP.
        vocabulary: tokens.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    size: int
    inner: int
    vocabulary: int = 32000

    @property
    def groups(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Linears of a layer that read the same input: input features, and output features of each."""
        queries, keys = self.heads * self.size, self.kv_heads * self.size
        return {
            "q k v": (self.hidden, (queries, keys, keys)),
            "o": (queries, (self.hidden,)),
            "gate up": (self.hidden, (self.inner, self.inner)),
            "down": (self.inner, (self.hidden,)),
        }

    def adapter_bytes(self, rank: int, itemsize: int = 2) -> int:
        """Return the bytes of a LoRA of all linears."""
        features = sum(k + n for k, widths in self.groups.values() for n in widths)
        return self.layers * features * rank * itemsize

    def weight_bytes(self, itemsize: int = 2) -> int:
        """Return the bytes of all linears and the output head, which every decode step reads."""
        linears = sum(k * n for k, widths in self.groups.values() for n in widths)
        return (self.layers * linears + self.vocabulary * self.hidden) * itemsize

    def kv_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Return the bytes of the keys and values of some tokens in all layers."""
        return tokens * self.layers * 2 * self.kv_heads * self.size * itemsize


SHAPES = {
    "7B": Shape("7B", 4096, 32, 32, 32, 128, 11008),
    "70B": Shape("70B", 8192, 80, 64, 8, 128, 28672),
}


@dataclass(frozen=True)
class Step:
    """The least that a decode step takes, in seconds: every byte read once."""

    weights: float
    kv: float
    adapters: float

    @classmethod
    def of(cls, shape: Shape, bandwidth: float, *, sequences: int, context: int, rank: int) -> Step:
        """Bound a step in which every sequence has an adapter of its own.

        Args:
            shape: of the base.
            bandwidth: bytes per second.
            sequences: one token each.
            context: tokens of each.
            rank: of the adapters, on all linears.
        """
        read = shape.weight_bytes(), shape.kv_bytes(sequences * context), sequences * shape.adapter_bytes(rank)
        return cls(*(count / bandwidth for count in read))

    @property
    def total(self) -> float:
        """Of all three."""
        return self.weights + self.kv + self.adapters
