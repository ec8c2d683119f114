"""Embeddings of texts from the hidden states of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import Problem, SpecError
from toolkit.models.modes import evaluating

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def mean_hidden_states(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    layer: int = -1,
    batch_size: int = 32,
    max_length: int = 512,
) -> torch.Tensor:
    """Return the mean over the tokens of each text of the hidden states after a layer.

    Args:
        model: any transformers model or encoder; evaluated without dropout, whatever its mode.
        tokenizer: of the model.
        texts: what to embed; longer ones are cut to `max_length` tokens.
        layer: index into the hidden states: 0 is the embeddings, -1 the last.
        batch_size: texts per forward pass.
        max_length: most tokens of a text.

    Returns:
        `[len(texts), H]` float32 on the CPU.

    Raises:
        SpecError: the model has no such layer.
    """
    import torch

    limit = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    pad = tokenizer.pad_token_id or 0
    encoded = [torch.tensor(tokenizer.encode(text)[:limit] or [pad]) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    means: list[torch.Tensor] = []
    with torch.inference_mode(), evaluating(model):
        for first in range(0, len(order), batch_size):
            rows = [encoded[i] for i in order[first : first + batch_size]]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(model.device)
            lengths = torch.tensor([len(row) for row in rows], device=model.device)[:, None]
            mask = torch.arange(tokens.shape[1], device=model.device)[None] < lengths
            output = model.base_model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True)
            states = _layer(output.hidden_states, layer).float().masked_fill(~mask[..., None], 0)
            means.append((states.sum(1) / lengths).cpu())
    return torch.cat(means)[torch.tensor(order).argsort()]


def _layer(states: Sequence[torch.Tensor], layer: int) -> torch.Tensor:
    if not -len(states) <= layer < len(states):
        known = f"0 (token embeddings) to {len(states) - 1}, or -1 (the last) to {-len(states)}"
        raise SpecError([Problem("embedding.layer", f"the model has the layers {known}, got {layer}")])
    return states[layer]
