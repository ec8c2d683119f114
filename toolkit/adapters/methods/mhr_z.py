"""MHR-z: a new task out of a trained POLY adapter, by its routing alone; the factors stay as they are.

Of a head `h`, `A_h = sum_s w_hs A_hs` and `B_h = sum_s w_hs B_hs` with `w_hs = sigmoid(z_hs) / sum_t sigmoid(z_ht)`.

Every module keeps the POLY's inventory of factors, cut into heads, and trains one number per head and skill. Their
sigmoids, divided by their sum in each head, mix the A's and the B's, each apart; so what is trained is a LoRA, and
folds into one. It starts from a task that the POLY was trained on, or from all skills alike.

Caccia et al., "Multi-Head Adapter Routing for Cross-Task Generalization", 2022, arXiv:2211.03831.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.adapters.compose.sources import read_source
from toolkit.adapters.methods._base import AdapterConfig, AdapterLayer, LowRank, Site, register, uniform


@dataclass
class MhrZConfig(AdapterConfig):
    """MHR-z.

    Attributes:
        source: folder or hub id of a POLY adapter, whose shape and modules the other fields then follow; without one
            the factors are random.
        task: of the POLY whose routing is the start; all skills alike by default.
        r: rank.
        n_skills: in the inventory.
        n_splits: heads.
    """

    source: str | None = None
    task: int | None = None
    r: int = 8
    n_skills: int = 4
    n_splits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.r, self.n_splits) < 1 or self.n_skills < 2:
            raise ValueError("r and n_splits are at least 1, n_skills at least 2: with one there is nothing to route")

    def resolve(self, model: nn.Module) -> None:
        """Read the POLY adapter.

        Raises:
            ValueError: the source is of another type.
        """
        folder = self.__dict__.setdefault("_folder", self.source)
        if folder is None:
            return
        fields, tensors = read_source(folder)
        if fields["peft_type"] != "POLY":
            raise ValueError(f"source: expected a POLY adapter, {folder} is {fields['peft_type']}")
        # A field that is not written has POLY's default, which is the same.
        self.r, self.n_skills = fields.get("r", 8), fields.get("n_skills", 4)
        self.n_splits = fields.get("n_splits", 1)
        self.target_modules = fields.get("target_modules")
        self.exclude_modules = fields.get("exclude_modules")
        self.__dict__["_tensors"] = tensors
        self.source = None  # what is saved holds the factors


class MhrZLinear(AdapterLayer):
    """A linear with an inventory of factors and a trained mixture of them."""

    TRAINED = ("logits",)
    STORED = ("a", "b")

    def start(self, config: MhrZConfig, site: Site) -> Mapping[str, Tensor]:
        """Take the factors of the source, and one of its rows of logits."""
        inputs, outputs = self.sizes
        heads, skills = config.n_splits, config.n_skills
        if inputs % heads or outputs % heads:
            raise ValueError(f"{heads} heads do not divide its sizes {inputs} and {outputs}")
        held: dict[str, Tensor] | None = config.__dict__.get("_tensors")
        if held is None:
            a = uniform((heads, skills, inputs // heads, config.r), fan_in=inputs)
            b = uniform((heads, skills, config.r, outputs // heads), fan_in=config.r)
            return {"a": a, "b": b, "logits": torch.zeros(heads, skills)}
        stem = f"base_model.model.{site.key}.poly_"
        rows = held[f"{stem}router.module_logits"].float().reshape(-1, heads, skills)
        if config.task is not None and not 0 <= config.task < len(rows):
            raise ValueError(f"task {config.task} of {len(rows)}; the first is 0")
        logits = torch.zeros(heads, skills) if config.task is None else rows[config.task].clone()
        return {"a": held[f"{stem}lora_A"].float(), "b": held[f"{stem}lora_B"].float(), "logits": logits}

    def routing(self, adapter: str) -> Tensor:
        """Return the weight of every skill in every head, `[n_splits, n_skills]`, one in sum."""
        weights = torch.sigmoid(self.tensor(adapter, "logits"))
        return weights / weights.sum(-1, keepdim=True)

    def low_rank(self, adapter: str) -> LowRank:
        """Return the mixed factors, scaled by `1 / r`."""
        weights, rank = self.routing(adapter), self.configs[adapter].r
        factors = (self.tensor(adapter, name).to(weights.dtype) for name in ("a", "b"))
        mixed_a, mixed_b = (torch.einsum("hs,hsxy->hxy", weights, factor) for factor in factors)
        return LowRank(mixed_a.reshape(-1, rank).T, mixed_b.transpose(1, 2).reshape(-1, rank), 1 / rank)

    def change(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return `B A x / r` with mixed factors."""
        a, b, scale = self.low_rank(adapter)
        return functional.linear(functional.linear(x, a), b) * scale


register("mhr_z", MhrZConfig, MhrZLinear)
