"""Poly and MHR: a task's mixture of skills, of the factors and not of the products; for a task it is one LoRA.

Every row of a batch belongs to a task, whose weights mix the A's and the B's of the skills, each apart, head by head.
With fixed tasks that is a LoRA of rank r per task, exactly, and rows of different tasks are rows of different adapters.

Ponti et al., "Combining Modular Skills in Multitask Learning", 2022, arXiv:2202.13914; Caccia et al., "Multi-Head
Adapter Routing for Cross-Task Generalization", 2022, arXiv:2211.03831. Shape suffixes: T rows, H heads, S skills.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from toolkit.checkpoints.adapters import CONFIG, WEIGHTS
from toolkit.checkpoints.reader import open_checkpoint, read_json
from toolkit.errors import CheckpointError, MissingError
from toolkit.kernels.grouped_lora import Pair

Task = int | Literal["unknown"]
"""Number of a task, or one that was not trained, for which all skills count the same."""

_FACTOR_A, _FACTOR_B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


def weights(logits: Tensor, tasks: Tensor, heads: int, skills: int) -> Tensor:
    """Return the weight of every skill in every head for the task of every row, `[T, H, S]`, one in sum.

    Args:
        logits: `[tasks, H * S]`.
        tasks: `[T]` int64.
        heads: H.
        skills: S.
    """
    shares = torch.sigmoid(logits[tasks]).view(-1, heads, skills)
    return shares / shares.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Skills:
    """The inventory at one linear.

    Attributes:
        a: `[H, S, K / H, r]`.
        b: `[H, S, r, N / H]`.
        logits: `[tasks, H * S]`.
    """

    a: Tensor
    b: Tensor
    logits: Tensor

    def pair(self, task: Task) -> Pair:
        """Return the LoRA of a task; its scale is `1 / r`."""
        heads, skills, _, rank = self.a.shape
        if task == "unknown":
            shares = self.a.new_full((heads, skills), 1 / skills)
        else:
            shares = weights(self.logits, torch.tensor([task]), heads, skills)[0]
        a = torch.einsum("hs,hsir->hir", shares, self.a).reshape(-1, rank).T
        b = torch.einsum("hs,hsro->hor", shares, self.b).reshape(-1, rank)
        return Pair(a.contiguous(), b.contiguous(), scale=1 / rank)


def read_skills(folder: Path) -> dict[str, Skills]:
    """Read a folder of PEFT's POLY.

    Raises:
        MissingError: no weights there.
        CheckpointError: tensors that do not fit each other.
    """
    config = read_json(folder / CONFIG)
    found: dict[str, dict[str, Tensor]] = {}
    with open_checkpoint(folder / WEIGHTS) as checkpoint:
        for name in checkpoint.tensors:
            site, _, part = name.removeprefix("base_model.model.").rpartition(".poly_")
            found.setdefault(site, {})[f"poly_{part}"] = checkpoint.tensor(name).float()
    return {site: _skills(site, parts, config, folder) for site, parts in found.items()}


def _skills(site: str, parts: Mapping[str, Tensor], config: Mapping[str, object], folder: Path) -> Skills:
    if set(parts) != {_FACTOR_A, _FACTOR_B, _LOGITS}:
        raise CheckpointError(f"{folder}: {site}: expected {_FACTOR_A}, {_FACTOR_B} and {_LOGITS}, got {sorted(parts)}")
    a, b, logits = parts[_FACTOR_A], parts[_FACTOR_B], parts[_LOGITS]
    fits = a.dim() == b.dim() == 4 and a.shape[:2] == b.shape[:2] and a.shape[3] == b.shape[2]
    if not fits or logits.dim() != 2 or logits.shape[1] != a.shape[0] * a.shape[1]:
        raise CheckpointError(
            f"{folder}: {site}: factors {list(a.shape)}, {list(b.shape)}, logits {list(logits.shape)}"
        )
    return Skills(a, b, logits)


def parse_task(text: str | None, skills: Mapping[str, Skills], source: str) -> Task:
    """Read what follows `#` in the name of a POLY folder.

    Raises:
        MissingError: no task, or one that the adapter does not have.
    """
    count = min(len(own.logits) for own in skills.values())
    if text == "unknown":
        return "unknown"
    if text is None or not text.isdecimal() or int(text) >= count:
        raise MissingError(
            f"{source}: a POLY adapter is a LoRA per task; name one as FOLDER#0 to #{count - 1} or #unknown"
        )
    return int(text)
