"""What an adapter's folder comes to for a served model: factors, changes of modules, keys and values before the prompt.

A *source* is a folder that was opened and checked against the model; its `read` gives the *contents* in the model's
dtype, on the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch

from toolkit.kernels.grouped_lora import Pair
from toolkit.serving.changes import Change
from toolkit.serving.own_pass import OwnPass


@dataclass(frozen=True)
class Prefix:
    """Keys and values that come before the prompt's own.

    Attributes:
        keys: `[layers, v, G, D]`.
        values: the same.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens that it stands for."""
        return self.keys.shape[1]

    def to(self, device: torch.device) -> Prefix:
        """Return it on a device."""
        return Prefix(self.keys.to(device), self.values.to(device))


@dataclass(frozen=True)
class Contents:
    """What an adapter does.

    Attributes:
        pairs: low-rank factors by the name of the linear or the embedding.
        changes: other changes by the name of the module.
        prefix: before every prompt, or `None`.
        own_pass: the model that requests run in, instead of the base; then there is nothing else.
    """

    pairs: Mapping[str, Pair] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    prefix: Prefix | None = None
    own_pass: OwnPass | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own = [t for p in self.pairs.values() for t in (p.a_rK, p.b_Nr, p.gain_N, p.bias_N) if t is not None]
        prefix = [self.prefix.keys, self.prefix.values] if self.prefix else []
        rest = sum(change.nbytes for change in self.changes.values())
        return sum(t.nbytes for t in (*own, *prefix)) + rest + (self.own_pass.nbytes if self.own_pass else 0)


class Source(ABC):
    """A folder that fits the model.

    Attributes:
        key: hash of its content.
        folder: where it is.
        description: kind, rank, modules.
        base: model that it says it was trained on.
        nbytes: of the contents, as far as that is known before they are read.
        ranks: of the factors at each linear or embedding, known before they are read.
        rescaled: linears whose outputs the factors come with a gain for (DoRA).
        num_virtual: tokens before the prompt.
        is_exclusive: it cannot be weighted or combined.
        is_apart: requests run one by one, each with a cache of its own.
    """

    key: str
    folder: Path
    description: str
    base: str | None = None
    nbytes: int
    ranks: Mapping[str, int] = MappingProxyType({})
    rescaled: Collection[str] = ()
    num_virtual: int = 0
    is_exclusive: bool = False
    is_apart: bool = False

    @abstractmethod
    def read(self) -> Contents:
        """Read the contents; called outside of the engine's thread.

        Raises:
            ToolkitError: the folder is no longer what it was when it was opened.
        """
