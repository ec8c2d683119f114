"""The specification: softmax over the tokens of one sequence and one head at a time."""

from __future__ import annotations

import torch

from toolkit.kernels.decode_attention.caches import Cache
from toolkit.kernels.scoring import Scoring, normalise


def decode_attention(
    q_SHD: torch.Tensor, cache: Cache, lengths: list[int], tables: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    out_SHD = torch.empty_like(q_SHD)
    lse_SH = torch.empty(q_SHD.shape[:2], dtype=torch.float32, device=q_SHD.device)
    groups = q_SHD.shape[1] // cache.heads
    for sequence, length in enumerate(lengths):
        k_LGD, v_LGD = (t.flatten(0, 1)[:length] for t in cache.read(tables[sequence, : -(-length // cache.page)]))
        token = torch.arange(length, device=q_SHD.device)
        seen = (token >= scoring.first_seen(length - 1)) | (token < scoring.num_global)
        for head in range(q_SHD.shape[1]):
            scores = scoring.scores(k_LGD[:, head // groups] @ q_SHD[sequence, head])
            sink = None if scoring.sinks_H is None else scoring.sinks_H[head]
            shares, lse_SH[sequence, head] = normalise(scores.masked_fill(~seen, -torch.inf), sink)
            out_SHD[sequence, head] = shares.to(v_LGD.dtype) @ v_LGD[:, head // groups]
    return out_SHD, lse_SH
