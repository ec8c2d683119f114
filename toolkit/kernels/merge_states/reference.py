"""The specification: every part counts with its share of the whole sum of exponentials."""

from __future__ import annotations

import torch


def merge_states(out_NTHD: torch.Tensor, lse_NTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    lse_TH = torch.logsumexp(lse_NTH, dim=0)
    shares_NTH = torch.exp(lse_NTH - lse_TH.masked_fill(lse_TH == -torch.inf, 0))
    out_THD = (shares_NTH[..., None] * out_NTHD.to(lse_NTH.dtype)).sum(dim=0)
    return out_THD.to(out_NTHD.dtype), lse_TH
