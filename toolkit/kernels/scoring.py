"""What attention operations do with the products of queries and keys before and after the exponential.

Shape suffixes: H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scoring:
    """How scores are made of products, which of them count, and what else takes part in the softmax.

    Attributes:
        scale: of the scores.
        window: tokens that a query sees, itself included; `None` sees all.
        num_global: first tokens of a sequence, seen by every later query whatever the window: the Lambda-shaped mask of
            LM-Infinite (Han et al. 2023, arXiv:2308.16137).
        soft_cap: scores become `cap * tanh(score / cap)`.
        sinks_H: score of a further key per head whose value is zero; it also counts in the returned sums.
    """

    scale: float
    window: int | None = None
    num_global: int = 0
    soft_cap: float | None = None
    sinks_H: torch.Tensor | None = None

    def check(self, num_heads: int) -> None:
        """Raise `ValueError` for numbers that mean nothing, and for sinks of other heads than the queries'."""
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} tokens; a query sees itself, so it is at least 1")
        if self.num_global < 0:
            raise ValueError(f"{self.num_global} global tokens; there can be none or more")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"scores capped at {self.soft_cap}; a cap is above 0")
        if self.sinks_H is not None and tuple(self.sinks_H.shape) != (num_heads,):
            raise ValueError(f"sinks of shape {tuple(self.sinks_H.shape)} for {num_heads} heads")

    def scores(self, products: torch.Tensor) -> torch.Tensor:
        """Return the scores of some products of queries and keys."""
        scores = products * self.scale
        return scores if self.soft_cap is None else self.soft_cap * torch.tanh(scores / self.soft_cap)

    def first_seen(self, position: int) -> int:
        """Return the first token that the window of a query at a position reaches."""
        return 0 if self.window is None else max(0, position - self.window + 1)


def normalise(scores: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shares of all keys and the logarithm of the sum of exponentials.

    Args:
        scores: `[..., L]`, minus infinity where a key is not seen; a row that sees none gets shares of 0.
        sinks: of a shape that broadcasts with `[...]`, or `None`.
    """
    none = (scores == -torch.inf).all(dim=-1, keepdim=True)
    # Rows that see nothing take a detour, as the gradient of a sum of no exponentials is not a number.
    sums = torch.logsumexp(scores.masked_fill(none, 0), dim=-1, keepdim=True)
    lse = sums.masked_fill(none, -torch.inf)
    if sinks is not None:
        sums = lse = torch.logaddexp(lse, sinks[..., None].to(lse.dtype))
    return torch.exp(scores - sums), lse[..., 0]
