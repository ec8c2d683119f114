"""A linear classifier on an encoder's pooled output, in a folder of its own: fine-tunes of one base are merged
without their heads, whose sizes differ from task to task.

`head.safetensors` holds `weight` `[C, H]` and `bias` `[C]`, `head.json` the names of the `C` labels and how the tokens
of a text are pooled: their `mean`, or the first one, `cls`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.checkpoints.dtypes import DTYPES, encode
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.reader import FolderCheckpoint, read_json
from toolkit.checkpoints.writer import staged, write_text, write_weights
from toolkit.errors import CheckpointError, MissingError

CONFIG, WEIGHTS = "head.json", "head.safetensors"

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class Head:
    """A linear classifier.

    Attributes:
        weight: `[C, H]` float32.
        bias: `[C]` float32.
        labels: names of the `C` classes.
        pooling: of the tokens of a text.
    """

    weight: Tensor
    bias: Tensor
    labels: tuple[str, ...]
    pooling: Pooling = "mean"

    def __call__(self, pooled: Tensor) -> Tensor:
        """Return the logits `[B, C]` of pooled texts `[B, H]`."""
        return functional.linear(pooled, self.weight.to(pooled.device), self.bias.to(pooled.device))


def write_head(head: Head, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a head's folder; it appears only when it is whole.

    Raises:
        OutputError: `out` exists, or cannot be written.
    """
    with staged(Path(out), overwrite=overwrite) as folder:
        values = {"weight": head.weight, "bias": head.bias}
        infos = [TensorInfo(name, DTYPES["F32"], tuple(value.shape)) for name, value in values.items()]
        raw = {n: encode(v.detach().float().cpu().reshape(-1).numpy(), DTYPES["F32"]) for n, v in values.items()}
        write_weights(folder, infos, raw, stem="head")
        write_text(folder / CONFIG, json.dumps({"labels": head.labels, "pooling": head.pooling}, indent=2) + "\n")
    return Path(out)


def read_head(source: str | Path) -> Head:
    """Read a head's folder.

    Raises:
        MissingError: there is none.
        CheckpointError: its parts do not fit together.
    """
    folder = Path(source).expanduser()
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise MissingError(f"{source}: no head here, which is a folder with {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    labels, pooling = config.get("labels"), config.get("pooling", "mean")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"{folder / CONFIG}: labels is not a list of names")
    if pooling not in ("mean", "cls"):
        raise CheckpointError(f"{folder / CONFIG}: pooling {pooling!r} is neither mean nor cls")
    with FolderCheckpoint(folder / WEIGHTS) as stored:
        weight, bias = stored.tensor("weight").float(), stored.tensor("bias").float()
    if weight.shape[:1] != bias.shape or len(labels) != len(bias):
        raise CheckpointError(
            f"{source}: weight {list(weight.shape)}, bias {list(bias.shape)} and {len(labels)} labels do not fit"
        )
    return Head(weight, bias, tuple(labels), pooling)


def pooled(model: nn.Module, tokens: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Run an encoder and pool its tokens.

    Args:
        model: body of a transformers model.
        tokens: ids `[B, T]`.
        mask: 1 where a token is of the text, `[B, T]`.
        pooling: the `mean` of a text's tokens, or its first, `cls`.

    Returns:
        `[B, H]` float32.
    """
    states = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
    if pooling == "cls":
        return states[:, 0]
    share = mask[..., None].to(states.dtype)
    return (states * share).sum(1) / share.sum(1)


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids `[B, T]`, filled up with `pad`, and their mask `[B, T]`."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens.to(device), (torch.arange(tokens.shape[1]) < lengths[:, None]).long().to(device)
