"""Logit arithmetic with fixed weights: the large model plus what fine-tuning changed in each small one.

`logits = large + sum_i alpha_i * (expert_i - base)`.

Mitchell et al., "An emulator for fine-tuning large language models using small language models", 2024; Liu et al.,
"Tuning language models by proxy", 2024, whose weight is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from toolkit.errors import Problem, SpecError
from toolkit.names import did_you_mean
from toolkit.specs import Spec

if TYPE_CHECKING:
    from torch import Tensor


class Params(Spec):
    """Parameters of `logit_arithmetic`.

    Attributes:
        alpha: weight of every expert, or expert -> weight; 0 for an expert that is not named.
    """

    alpha: float | dict[str, float] = Field(default=1.0)


def check(experts: Sequence[str], params: Params) -> None:
    """Raise a `SpecError` where the parameters do not fit the experts."""
    named = params.alpha if isinstance(params.alpha, dict) else {}
    unknown = [name for name in named if name not in experts]
    if unknown:
        raise SpecError([Problem(f"alpha.{n}", f"not an expert{did_you_mean(n, experts)}") for n in unknown])


def weights(large: Tensor, base: Tensor, experts: Tensor, names: Sequence[str], params: Params) -> Tensor:
    """Return the same weights for every row, `[B, T]` float32."""
    alpha = params.alpha
    fixed = [alpha.get(name, 0.0) if isinstance(alpha, dict) else alpha for name in names]
    return large.new_tensor(fixed).expand(len(large), -1)
