"""The specification: softmax of masked scores, one sequence at a time, in the dtype of the inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from toolkit.kernels.paging import gather, visible
from toolkit.kernels.scoring import Scoring, normalise


def prefill_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    tables: torch.Tensor,
    positions: list[int],
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    states = [
        attend(
            q_THD[starts[index] : starts[index + 1]],
            gather(k_cache, tables[index], length),
            gather(v_cache, tables[index], length),
            positions[index],
            scoring,
        )
        for index, length in enumerate(lengths)
    ]
    return _joined(states, q_THD)


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
    states = [
        attend(
            q_THD[starts[index] : starts[index + 1]],
            k_LGD[key_starts[index] : key_starts[index + 1]],
            v_LGD[key_starts[index] : key_starts[index + 1]],
            position,
            scoring,
        )
        for index, position in enumerate(positions)
    ]
    return _joined(states, q_THD)


def attend(
    q_QHD: torch.Tensor, k_LGD: torch.Tensor, v_LGD: torch.Tensor, position: int, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within one sequence, whose first query is at `position`."""
    groups, length = q_QHD.shape[1] // k_LGD.shape[1], len(k_LGD)
    k_LHD, v_LHD = k_LGD.repeat_interleave(groups, dim=1), v_LGD.repeat_interleave(groups, dim=1)
    scores_HQL = scoring.scores(torch.einsum("qhd,khd->hqk", q_QHD, k_LHD))
    seen = visible(position, position + len(q_QHD), length, scoring.window, q_QHD.device, scoring.num_global)
    sinks = None if scoring.sinks_H is None else scoring.sinks_H[:, None]
    shares_HQL, lse_HQ = normalise(scores_HQL.masked_fill(~seen, -torch.inf), sinks)
    return torch.einsum("hqk,khd->qhd", shares_HQL.to(v_LHD.dtype), v_LHD), lse_HQ.T


def _joined(
    states: Sequence[tuple[torch.Tensor, torch.Tensor]], q_THD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if not states:
        return torch.empty_like(q_THD), torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
    outputs, sums = zip(*states, strict=True)
    lse_TH = torch.cat(sums)
    return torch.cat(outputs), lse_TH if lse_TH.dtype == torch.float64 else lse_TH.float()
