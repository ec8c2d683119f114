"""Embed texts: the texts of a pair near each other and far from those of all other pairs in the batch (1807.03748).

`loss_i = -log softmax_j(cos(query_i, passage_j) / temperature)_i`, over all positives and negatives of the batch as
passages; one that equals the positive of the query but belongs to another row is left out. The mean over the rows of
a step is taken; other batches of the step, and other processes, give no negatives.

The embedding is the normalised hidden state after the last norm, of the last token or the mean over all tokens: what
the server's `/v1/embeddings` returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from toolkit.adapters.objectives._base import Measures, Objective, model_inputs, text_of
from toolkit.data.render import IGNORED
from toolkit.data.rows import Row

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer


class Embedding(Objective):
    """Rows of `query`, `positive` and, at will, `negative`."""

    class Params(Objective.Params):
        """Parameters.

        Attributes:
            temperature: of the softmax over cosines.
            pooling: of which tokens the hidden state is taken.
        """

        temperature: Annotated[float, Field(gt=0)] = 0.05
        pooling: Literal["last", "mean"] = "last"

    params: Params
    whole = True

    def texts(self, row: Row) -> list[Row]:
        """Return the query, its passage, and a passage that does not answer it, if there is one."""
        fields = ("query", "positive", "negative") if row.data.get("negative") is not None else ("query", "positive")
        return [text_of(row, field) for field in fields]

    def measure(self, trainer: AdapterTrainer, model: nn.Module, inputs: dict[str, Any]) -> Measures:
        """Return the loss, and for how many queries their own passage is the nearest."""
        classes, tokens = inputs["classes"], inputs["input_ids"]
        count, real = len(classes), classes >= 0
        vectors = self._embedded(model, inputs)
        scores = vectors[:count] @ vectors[count:].T / self.params.temperature  # [B, passages]
        scores = scores.masked_fill(_others(tokens[count:], real), -torch.inf)
        targets = torch.where(real, torch.arange(count, device=scores.device), IGNORED)
        total = cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum")
        right = (scores.argmax(1) == targets)[real].sum()
        return {"loss": (total, real.sum()), "accuracy": (right, real.sum())}

    def _embedded(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the embedding of every text, `[N, H]` float32."""
        lengths = inputs["lengths"]
        given = model_inputs(inputs, labels=False)
        # The head's logits are of no use here; of one token they cost little.
        states = model(**given, output_hidden_states=True, logits_to_keep=1, use_cache=False).hidden_states[-1].float()
        if self.params.pooling == "last":
            pooled = states.take_along_dim(lengths[:, None, None] - 1, dim=1)[:, 0]
        else:
            mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
            pooled = (states * mask[..., None]).sum(dim=1) / lengths[:, None]
        return normalize(pooled, dim=-1)


def _others(passages: Tensor, real: Tensor) -> Tensor:
    """Tell which passages are no negatives of a query, `[B, P]`: its positive again, or one that fills the batch."""
    count = len(real)
    left_out = (passages[:count, None] == passages[None]).all(dim=-1)
    left_out[:, :count] |= ~real
    left_out.fill_diagonal_(False)
    return left_out
