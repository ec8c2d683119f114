"""Batches of rows of different length as rectangular tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolkit.data.pack import Packed
from toolkit.data.render import IGNORED

if TYPE_CHECKING:
    import torch


class Collator:
    """Pads rows on the right.

    No attention mask is passed: padding stands after every real token, where a causal model never looks, and
    continues the positions of the last document, so that transformers sees documents only where there are some. No
    position of padding is past the longest document's, since the model may have no more.

    Args:
        pad: id of the padding token.
        positions: pass `position_ids`, which packed rows need.
        tasks: pass `task_ids`, the number of each row's task.
    """

    def __init__(self, pad: int, *, positions: bool = True, tasks: bool = False) -> None:
        self.pad, self.positions, self.tasks = pad, positions, tasks

    def __call__(self, rows: Sequence[Packed]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and, if wanted, `position_ids`, each `[B, T]`; `task_ids` `[B]`."""
        import torch

        length = max(len(row.tokens) for row in rows)
        longest = max(max(row.positions) for row in rows) + 1
        tokens, labels, positions = [], [], []
        for row in rows:
            missing = length - len(row.tokens)
            after = row.positions[-1] + 1
            tokens.append(row.tokens + [self.pad] * missing)
            labels.append(row.labels + [IGNORED] * missing)
            positions.append([*row.positions, *(p % longest for p in range(after, after + missing))])
        batch = {"input_ids": torch.tensor(tokens), "labels": torch.tensor(labels)}
        if self.positions:
            batch["position_ids"] = torch.tensor(positions)
        if self.tasks:
            batch["task_ids"] = torch.tensor([row.task for row in rows])
        return batch
