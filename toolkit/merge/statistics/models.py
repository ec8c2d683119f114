"""The models of a merge as transformers models that can be run, and their data as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.reader import Checkpoint, FolderCheckpoint
from toolkit.data.render import IGNORED, Example, Renderer
from toolkit.data.rows import read_rows
from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import UnsupportedError
from toolkit.merge.spec import DataSpec
from toolkit.models.load import explained, load_model, load_tokenizer, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tokenizer_of(donor: Checkpoint) -> Tokenizer:
    """Return the tokenizer of the output.

    Raises:
        UnsupportedError: the donor is a model in memory, which has none.
    """
    if donor.folder is None:
        raise UnsupportedError(f"{donor.source}: a model in memory has no tokenizer to read data with; save it first")
    return load_tokenizer(donor.folder)


def runnable(checkpoint: Checkpoint, device: torch.device) -> PreTrainedModel:
    """Return a model with a checkpoint's weights in float32, ready to be run.

    Raises:
        UnsupportedError: weights that are computed, such as a base with a LoRA, whose names are not the model's.
    """
    if type(checkpoint) is FolderCheckpoint:
        return load_model(checkpoint.folder, device=device, dtype=torch.float32).model
    from transformers import AutoConfig, AutoModelForCausalLM

    with explained(checkpoint.source), quiet_transformers():
        settings = dict(checkpoint.config)
        config = AutoConfig.for_model(settings.pop("model_type", ""), **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = tensor_names(model, checkpoint)
    for name, parameter in model.named_parameters():
        if name not in names:
            raise UnsupportedError(f"{checkpoint.source}: has no tensor for {name}; write the model out and merge that")
        fill(parameter, checkpoint, names[name])
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]  # a decorator of transformers hides self


def fill(parameter: torch.Tensor, checkpoint: Checkpoint, name: str) -> None:
    """Copy a tensor of a checkpoint into a parameter of a model."""
    info = checkpoint.info(name)
    values = np.empty(info.count, np.float32)
    for start, stop in chunks(info.shape):
        checkpoint.read(name, start, stop, values[start:stop])
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(values).reshape(info.shape))


def tensor_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Return for each parameter of a model the checkpoint's name of it; some checkpoints leave out the first word."""
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, parameter in model.named_parameters():
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if checkpoint.has(candidate) and checkpoint.info(candidate).shape == tuple(parameter.shape):
                found[name] = candidate
                break
    return found


def examples_of(files: Sequence[str], tokenizer: Tokenizer, context: int, spec: DataSpec) -> list[Example]:
    """Render the first rows of a model's data, at most `context` tokens of each."""
    renderer = Renderer(tokenizer, spec.max_length, too_long="truncate", empty="skip", context=context)
    return renderer.render_all(read_rows(files)[: spec.limit])[0]


def tokens_of(example: Example, device: torch.device) -> torch.Tensor:
    """Return an example's ids, `[1, T]`."""
    return torch.tensor([example.tokens], device=device)


def targets_of(example: Example, device: torch.device) -> torch.Tensor:
    """Return the ids that are predicted, `[T - 1]`, with -100 where none is trained."""
    return torch.tensor(example.labels[1:], device=device)


__all__ = ["IGNORED", "examples_of", "fill", "runnable", "targets_of", "tensor_names", "tokenizer_of", "tokens_of"]
