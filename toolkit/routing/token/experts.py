"""LoRA experts as token routers see them: the factors at every linear, and what the folder is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkit.checkpoints.adapters import Adapter, open_adapter
from toolkit.errors import UnsupportedError
from toolkit.kernels.grouped_lora import Pair


@dataclass(frozen=True)
class Expert:
    """A LoRA.

    Attributes:
        key: hash of its content.
        folder: where it is.
        pairs: factors by the names of the linears.
    """

    key: str
    folder: Path
    pairs: Mapping[str, Pair]


def read_expert(source: str | Path) -> Expert:
    """Read a PEFT folder.

    Raises:
        MissingError: nothing there.
        CheckpointError: broken files.
        UnsupportedError: it does more than to add a product to linears.
    """
    adapter = open_adapter(source)
    with adapter.store:
        # PEFT stores the frozen weight of a head that is adapted, too.
        whole = set(adapter.whole) - set(adapter.targets)
        if adapter.is_dora or whole or any(part.embedding for part in adapter.parts.values()):
            raise UnsupportedError(f"{source}: {ONLY}")
        pairs = {name: _pair(adapter, name) for name in adapter.parts}
        return Expert(adapter.content_hash, adapter.folder, pairs)


def _pair(adapter: Adapter, name: str) -> Pair:
    low_rank = adapter.low_rank(name)
    rows, cols = torch.from_numpy(low_rank.rows), torch.from_numpy(low_rank.cols)
    a, b = (rows.T, cols.T) if low_rank.transposed else (cols, rows)
    return Pair(a.contiguous(), b.contiguous(), scale=low_rank.scale)


ONLY = "tokens are routed among LoRAs that only add a product to linears"
