"""Attention over packed keys and values as a function with gradients, on the Triton kernels.

Backward starts from the queries, keys, values, outputs and logarithms of sums alone: shares are recomputed.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from toolkit.kernels.launch import launch
from toolkit.kernels.prefill_attention import triton as kernels
from toolkit.kernels.prefill_attention import triton_form as forms
from toolkit.kernels.scoring import Scoring


def packed_attention(
    q_THD: torch.Tensor,
    k_LGD: torch.Tensor,
    v_LGD: torch.Tensor,
    starts: list[int],
    key_starts: list[int],
    positions: list[int],
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    lengths = [stop - start for start, stop in pairwise(key_starts)]
    group = q_THD.shape[1] // k_LGD.shape[1]
    sequences = forms.list_sequences(starts, lengths, positions, key_starts[:-1], group)
    return _PackedAttention.apply(q_THD, k_LGD, v_LGD, scoring.sinks_H, sequences, scoring)  # pyright: ignore[reportReturnType]


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q_THD, k_LGD, v_LGD, sinks_H, sequences, scoring = inputs
        out_THD, lse_TH = forms.forward(q_THD, k_LGD, v_LGD, sequences, scoring)
        ctx.save_for_backward(q_THD, k_LGD, v_LGD, sinks_H, out_THD, lse_TH)
        ctx.sequences, ctx.scoring = sequences, scoring
        return out_THD, lse_TH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dout_THD, dlse_TH = grads
        q_THD, k_LGD, v_LGD, sinks_H, out_THD, lse_TH = ctx.saved_tensors
        delta_TH = (dout_THD.float() * out_THD.float()).sum(dim=-1) - dlse_TH
        gradients = _Gradients(q_THD, k_LGD, v_LGD, dout_THD.contiguous(), lse_TH, delta_TH, ctx.sequences, ctx.scoring)
        dsinks_H = None
        if sinks_H is not None:
            dsinks_H = -(torch.exp(sinks_H.float() - lse_TH) * delta_TH).sum(dim=0).to(sinks_H.dtype)
        return gradients.of_queries(), *gradients.of_keys(), dsinks_H, None, None


class _Gradients:
    """The launches of a backward pass."""

    def __init__(
        self,
        q_THD: torch.Tensor,
        k_LGD: torch.Tensor,
        v_LGD: torch.Tensor,
        dout_THD: torch.Tensor,
        lse_TH: torch.Tensor,
        delta_TH: torch.Tensor,
        sequences: tuple[forms.Item, ...],
        scoring: Scoring,
    ) -> None:
        self.q, self.k, self.v, self.sequences = q_THD, k_LGD, v_LGD, sequences
        self.scoring = replace(scoring, sinks_H=None)
        self.arguments = forms.common(q_THD, k_LGD, v_LGD, scoring)
        self.arguments |= {"dout_ptr": dout_THD, "lse_ptr": lse_TH, "delta_ptr": delta_TH.contiguous()}

    def of_queries(self) -> torch.Tensor:
        dq_THD = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        found = forms.configuration("_grad_queries", self.q, self.k, self.sequences, self.scoring)
        blocks = found.constants
        items = forms.row_blocks(self.sequences, blocks["BLOCK_M"], blocks["GROUP"], self.q.device)
        arguments = self.arguments | {"dq_ptr": dq_THD, "items_ptr": items}
        launch(kernels._grad_queries, (len(items), self.k.shape[1]), arguments, found)
        return dq_THD

    def of_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        dk_LGD, dv_LGD = (torch.empty(self.k.shape, dtype=self.k.dtype, device=self.k.device) for _ in range(2))
        found = forms.configuration("_grad_keys", self.q, self.k, self.sequences, self.scoring)
        items = forms.key_blocks(self.sequences, found.constants["BLOCK_N"], self.k.device)
        arguments = self.arguments | {"dk_ptr": dk_LGD, "dv_ptr": dv_LGD, "items_ptr": items}
        launch(kernels._grad_keys, (len(items), self.k.shape[1]), arguments, found)
        return dk_LGD, dv_LGD
