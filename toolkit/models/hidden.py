"""What a model makes of texts inside: their embeddings from one layer, and what enters its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import Problem, SpecError
from toolkit.models.modes import evaluating

if TYPE_CHECKING:
    import torch
    from torch import nn
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
    places: list[int] = []
    means: list[torch.Tensor] = []
    for batch in _batches(model, encoded, pad, batch_size):
        places += batch.places
        means.append(batch.mean(_layer(batch.states, layer)).cpu())
    return torch.cat(means)[torch.tensor(places).argsort()]


def module_inputs(
    model: PreTrainedModel,
    modules: Sequence[nn.Module],
    rows: Sequence[Sequence[int]],
    *,
    pool: Literal["last", "mean"] = "last",
    batch_size: int = 8,
) -> torch.Tensor:
    """Return the hidden states that enter parts of a model, at the last token of each text or the mean over its tokens.

    Args:
        model: any transformers decoder; evaluated without dropout, whatever its mode.
        modules: parts that take hidden states as their first argument, such as its layers, or their MLPs.
        rows: token ids of texts, none of them empty.
        pool: which of a text's states.
        batch_size: texts per forward pass.

    Returns:
        `[len(rows), len(modules), H]` float32 on the CPU.
    """
    import torch

    entered: dict[nn.Module, torch.Tensor] = {}
    places: list[int] = []
    vectors: list[torch.Tensor] = []
    handles = [m.register_forward_pre_hook(lambda m, given: entered.update({m: given[0]})) for m in modules]
    try:
        for batch in _batches(model, [torch.tensor(row) for row in rows], 0, batch_size):
            of_text = batch.mean if pool == "mean" else batch.last
            places += batch.places
            vectors.append(torch.stack([of_text(entered[module]).cpu() for module in modules], dim=1))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(vectors)[torch.tensor(places).argsort()]


class _Batch(NamedTuple):
    """Hidden states of a few texts.

    Attributes:
        places: of the texts among all, `[B]`.
        mask: which tokens are of the text, `[B, T]`.
        lengths: tokens of each text, `[B, 1]`.
        states: token embeddings, then what leaves each layer, `[B, T, H]` each.
    """

    places: list[int]
    mask: torch.Tensor
    lengths: torch.Tensor
    states: Sequence[torch.Tensor]

    def mean(self, states: torch.Tensor) -> torch.Tensor:
        """Return the mean over the tokens of each text, `[B, H]` float32."""
        return states.float().masked_fill(~self.mask[..., None], 0).sum(1) / self.lengths

    def last(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states at the last token of each text, `[B, H]` float32."""
        return states.float().take_along_dim(self.lengths[..., None] - 1, dim=1)[:, 0]


def _batches(model: PreTrainedModel, encoded: Sequence[torch.Tensor], pad: int, batch_size: int) -> Iterator[_Batch]:
    """Run texts through a model, those of similar length together."""
    import torch

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        rows = [encoded[i] for i in places]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)[:, None]
        mask = torch.arange(tokens.shape[1], device=model.device)[None] < lengths
        with torch.inference_mode(), evaluating(model):
            output = model.base_model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True)
        yield _Batch(places, mask, lengths, output.hidden_states)


def _layer(states: Sequence[torch.Tensor], layer: int) -> torch.Tensor:
    if not -len(states) <= layer < len(states):
        known = f"0 (token embeddings) to {len(states) - 1}, or -1 (the last) to {-len(states)}"
        raise SpecError([Problem("embedding.layer", f"the model has the layers {known}, got {layer}")])
    return states[layer]
