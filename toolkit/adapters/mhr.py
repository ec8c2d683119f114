"""Multi-head adapter routing over PEFT's POLY: what to do with it once it is trained on several tasks.

POLY holds an inventory of `n_skills` adapters, cut into `n_splits` heads, and for every task logits that mix them: in
evaluation their sigmoids, divided by their sum in each head. It is the *factors* A and B that are mixed, each apart,
and the product is not a mixture of products. For a new task, MHR-z trains the mixture alone (through a spec
it is the method `mhr_z`) and MHR-mu a LoRA that starts at the average of all factors.

Caccia et al., "Multi-Head Adapter Routing for Cross-Task Generalization", 2022, arXiv:2211.03831; one head is
Polytropon, Ponti et al., "Combining Modular Skills in Multitask Learning", 2022, arXiv:2202.13914.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.poly.layer import PolyLayer
from torch import Tensor, nn

from toolkit.adapters.methods._base import LowRank

Task = int | Literal["unknown"]
"""Number of a task, or one that the adapter was not trained on, for which all skills count the same."""


def poly_layers(model: nn.Module, adapter: str = "default") -> dict[str, PolyLayer]:
    """Return the layers of a POLY adapter by the names of the modules that they adapt.

    Raises:
        ValueError: the model has no such adapter.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {n: m for n, m in base.named_modules() if isinstance(m, PolyLayer) and adapter in m.poly_lora_A}
    if not found:
        raise ValueError(f"no POLY adapter {adapter!r} on this model")
    return found


def routing(layer: PolyLayer, task: Task, adapter: str = "default") -> Tensor:
    """Return the weight of every skill in every head, as in evaluation.

    Args:
        layer: of the adapter.
        task: whose mixture.
        adapter: its name.

    Returns:
        `[n_splits, n_skills]`, each row adding up to one.

    Raises:
        ValueError: no such task.
    """
    shape = layer.n_splits[adapter], layer.n_skills[adapter]
    router: Any = layer.poly_router[adapter]
    logits: Tensor = router.module_logits
    if task == "unknown":
        return logits.new_full(shape, 1 / shape[1])
    if not 0 <= task < len(logits):
        raise ValueError(f"task {task} of {len(logits)}; the first is 0")
    weights = torch.sigmoid(logits[task].reshape(shape))
    return weights / weights.sum(-1, keepdim=True)


def mixed(layer: PolyLayer, task: Task, adapter: str = "default") -> LowRank:
    """Return the LoRA that an adapter is for one task: the mixed factors, scaled by `1 / r`."""
    weights = routing(layer, task, adapter)
    a, b = layer.poly_lora_A[adapter], layer.poly_lora_B[adapter]
    mixed_a = torch.einsum("hs,hsir->hir", weights, a).reshape(-1, a.shape[-1])
    mixed_b = torch.einsum("hs,hsro->hor", weights, b).reshape(-1, a.shape[-1])
    return LowRank(mixed_a.T, mixed_b, 1 / layer.r[adapter])


def train_routing_only(model: nn.Module, adapter: str = "default") -> None:
    """MHR-z: freeze the factors, so that training changes the logits alone, whatever adapter is active in between."""
    for layer in poly_layers(model, adapter).values():
        layer.frozen_peft_weight_names = {
            **layer.frozen_peft_weight_names,
            adapter: ("poly_lora_A", "poly_lora_B"),
        }
        layer._freeze_non_trainable_peft_weights(adapter)


def add_unknown_task(model: PeftModel, adapter: str = "default") -> int:
    """Add a task to the adapter for which all skills count the same; return its number.

    It is a row of zeros in the logits, so that stock PEFT knows it too, from the next save on.
    """
    layers = poly_layers(model, adapter)
    for layer in layers.values():
        router: Any = layer.poly_router[adapter]
        logits = router.module_logits
        row = logits.data.new_zeros(1, logits.shape[1])
        router.module_logits = nn.Parameter(torch.cat([logits.data, row]), requires_grad=logits.requires_grad)
        router.n_tasks += 1
        layer.n_tasks[adapter] += 1
    config: Any = model.peft_config[adapter]
    config.n_tasks += 1
    return config.n_tasks - 1
