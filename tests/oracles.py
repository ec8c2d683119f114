"""Independent answers, and the rule by which numbers of low precision are judged."""

from __future__ import annotations

import torch


def check_stick(got: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, *, slack: float = 1.0) -> None:
    """Judge a result per row and per column against float64 on the same low-precision inputs.

    `error <= 2 * max(error of eager torch, 0.5 * eps * norm)`: absolute and relative tolerances that are the same
    for all elements let a 2% wrong scale, one wrong row or dropped columns pass. In float32 both errors are a few
    roundings of a short sum, so there the factor is 4. It is multiplied with `slack` where rows have so few numbers
    that their errors average little out.
    """
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    eps = torch.finfo(got.dtype).eps
    factor = slack * (4 if got.dtype == torch.float32 else 2)
    exact, got, eager = (t.double().reshape(-1, t.shape[-1]) for t in (exact, got, eager))
    for dim in (0, 1):
        error, allowed = (got - exact).norm(dim=dim), (eager - exact).norm(dim=dim)
        limit = factor * torch.maximum(allowed, 0.5 * eps * exact.norm(dim=dim))
        worst = int((error - limit).argmax())
        assert (error <= limit).all(), (
            f"{('column', 'row')[dim]} {worst}: error {error[worst]:.3g} over {limit[worst]:.3g}"
        )
