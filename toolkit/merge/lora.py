"""Write what one fine-tune changed of its base as a LoRA folder that PEFT loads.

Matrices become low-rank pairs. Modules whose tensors no pair can hold, such as norms, are kept whole, in PEFT's
`modules_to_save`; the biases of linears are kept as the trained biases of a LoRA are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.checkpoints.adapters import CONFIG, WEIGHTS
from toolkit.checkpoints.dtypes import DType
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.layout import INPUT_EMBEDDINGS, role_of
from toolkit.checkpoints.writer import WeightsWriter, write_text
from toolkit.errors import UnsupportedError
from toolkit.merge.changes import Changes
from toolkit.merge.compress import PairPlace, RankRule, copy_whole
from toolkit.merge.lowrank import PREFIX, adapter_config, pair_names
from toolkit.progress import Progress

TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types of transformers whose linears are Conv1D modules, with weights `[in, out]`."""

TIED_HEAD = "lm_head"
"""Module of transformers' language models that shares the weights of the input embedding."""

_NO_TARGET = "dummy-target-modules"
"""What PEFT calls the targets of an adapter that has no pairs."""


@dataclass(frozen=True)
class LoraPlan:
    """What a LoRA folder will hold.

    Attributes:
        matrices: tensors that are factored.
        biases: of linears.
        modules: that are kept whole.
        whole: stored name -> tensor, of those modules.
        tied: whether the embedding is one of them, and the output head the same.
    """

    matrices: list[str]
    biases: list[str]
    modules: list[str]
    whole: dict[str, str]
    tied: bool = False


def plan_lora(changes: Changes, is_compressed: Callable[[str], bool]) -> LoraPlan:
    """Decide for every changed tensor how a LoRA folder holds it.

    Raises:
        UnsupportedError: a tensor that no LoRA folder can hold.
    """
    changed = [name for name in changes.jobs if changes.changed(name)]
    whole = {
        _module(name)
        for name in changed
        if not _is_matrix(changes, name, is_compressed) and not _is_bias(changes, name)
    }
    matrices = [name for name in changed if _is_matrix(changes, name, is_compressed) and _module(name) not in whole]
    biases = [name for name in changed if _is_bias(changes, name) and _module(name) not in whole]
    modules = sorted(whole)
    kept = {PREFIX + name: name for module in modules for name in _tensors_of(changes, module)}
    ties = changes.base.ties_head and f"{TIED_HEAD}.weight" not in changes.tensors
    tied = next((name for name in kept.values() if ties and name.endswith(INPUT_EMBEDDINGS)), None)
    if tied is not None:
        # PEFT wants the values of both modules, and ties the copies that it makes of them again.
        modules.append(TIED_HEAD)
        kept[f"{PREFIX}{TIED_HEAD}.weight"] = tied
    return LoraPlan(matrices, biases, modules, kept, tied is not None)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_matrix(changes: Changes, name: str, is_compressed: Callable[[str], bool]) -> bool:
    if len(changes.shape(name)) != 2 or not name.endswith(".weight") or not is_compressed(name):
        return False
    if _is_flipped(changes) and role_of(name) == "head":
        return False  # a Linear among Conv1D modules; one fan_in_fan_out holds for all
    # PEFT adapts one of two tied modules only, so an embedding that is also the head is kept whole.
    return not (changes.base.ties_head and name.endswith(INPUT_EMBEDDINGS))


def _is_flipped(changes: Changes) -> bool:
    return changes.base.config.get("model_type") in TRANSPOSED


def _is_bias(changes: Changes, name: str) -> bool:
    """Tell whether a tensor is the bias of a linear, which a LoRA can bring along."""
    weight = f"{_module(name)}.weight"
    return name.endswith(".bias") and weight in changes.tensors and len(changes.shape(weight)) == 2


def _tensors_of(changes: Changes, module: str) -> list[str]:
    """Name the tensors of a module that is kept whole."""
    names = [name for name in changes.tensors if name.startswith(f"{module}.")]
    if not module or any(_module(name) != module for name in names):
        inner = "the whole model" if not module else f"{module}, which holds other modules"
        raise UnsupportedError(f"no LoRA folder can hold a change of {inner}; extract it as svd, mask or bit instead")
    return names


def write_lora(
    folder: Path, changes: Changes, plan: LoraPlan, rule: RankRule, dtype: DType, progress: Progress
) -> None:
    """Write the folder; matrices that the rule leaves no rank are left out."""
    [task] = changes.tasks
    spent = sum(_info(changes, name).nbytes for name in (*plan.biases, *plan.whole.values()))
    chosen = rule.apply(changes, [(name, task) for name in plan.matrices], dtype, spent, progress)
    ranks = {name: rank for (name, _), rank in chosen.items()}
    places = {name: _place(name, _is_flipped(changes)) for name in ranks}
    kept = plan.whole | {_bias_name(name, ranks): name for name in plan.biases}
    parts = [replace(_info(changes, name), name=stored) for stored, name in kept.items()]
    for name, rank in ranks.items():
        parts += places[name].infos(changes.shape(name), rank, dtype)
    writer = WeightsWriter(folder, {WEIGHTS: parts})
    try:
        for stored, name in kept.items():
            copy_whole(writer, changes, (name, task), stored)
        for name, rank in ranks.items():
            places[name].write(writer, changes.matrix(name, task), rank)
            progress.advance(changes.jobs[name].read_bytes)
    finally:
        writer.close()
    write_text(folder / CONFIG, json.dumps(_config(changes, plan, ranks), indent=2) + "\n")


def _info(changes: Changes, name: str) -> TensorInfo:
    return TensorInfo(name, changes.whole_dtype(name, changes.tasks[0]), changes.shape(name))


def _is_adapted(bias: str, ranks: Mapping[str, int]) -> bool:
    return f"{_module(bias)}.weight" in ranks


def _bias_name(name: str, ranks: Mapping[str, int]) -> str:
    """Return what PEFT calls a bias: that of an adapted linear is its base layer's."""
    return PREFIX + (f"{_module(name)}.base_layer.bias" if _is_adapted(name, ranks) else name)


def _place(name: str, flipped: bool) -> PairPlace:
    embedding = role_of(name) == "embedding"
    a, b = pair_names(_module(name), embedding)
    # Of a transposed weight A^T are the rows; see toolkit.checkpoints.adapters.
    return PairPlace(a, b, True) if embedding or flipped else PairPlace(b, a)


def _config(changes: Changes, plan: LoraPlan, ranks: Mapping[str, int]) -> dict[str, object]:
    architecture = (changes.base.config.get("architectures") or [""])[0]
    biases = "lora_only" if all(_is_adapted(name, ranks) for name in plan.biases) else "all"
    more: dict[str, object] = {
        "task_type": "CAUSAL_LM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "fan_in_fan_out": _is_flipped(changes),
        "bias": biases if plan.biases else "none",
        "modules_to_save": plan.modules or None,
        "ensure_weight_tying": plan.tied,
    }
    if not ranks:
        more |= {"target_modules": _NO_TARGET, "rank_pattern": {}, "alpha_pattern": {}}
    by_module = {_module(name): rank for name, rank in ranks.items()}
    return adapter_config(by_module or {"": 1}, changes.base.source, **more)
