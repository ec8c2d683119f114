"""Open the base and the experts of a mixture, and check that they fit, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from toolkit.checkpoints.compressed import on_base
from toolkit.checkpoints.deltas import AdaptedCheckpoint
from toolkit.checkpoints.layout import INPUT_EMBEDDINGS, Layout
from toolkit.checkpoints.reader import Checkpoint, open_checkpoint
from toolkit.checkpoints.tokenizers import other_tokens, read_tokenizer
from toolkit.errors import Problem, SpecError, ToolkitError
from toolkit.merge.inputs import change_of
from toolkit.merge.moe.architectures import PROJECTIONS, Architecture
from toolkit.merge.moe.spec import MoeSpec
from toolkit.merge.plan import open_merge
from toolkit.merge.spec import MergeSpec

EMBEDDINGS = f"model.{INPUT_EMBEDDINGS[0]}"


@dataclass(frozen=True)
class Models:
    """Opened models.

    Attributes:
        base: whose attention is taken.
        experts: by key path, the shared ones last.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]

    @cached_property
    def num_layers(self) -> int:
        """Layers of the base."""
        return Layout(self.base.tensors).num_layers.get("model.layers", 0)

    def close(self) -> None:
        """Close all files."""
        for checkpoint in (*self.experts.values(), self.base):
            checkpoint.close()


def mlp_name(layer: int, projection: str) -> str:
    """Name a tensor of a dense model's MLP."""
    return f"model.layers.{layer}.mlp.{projection}.weight"


def open_models(spec: MoeSpec, *, allow_pickle: bool = False) -> tuple[Models | None, list[Problem]]:
    """Open every model, gathering what is wrong with each; no models where the base cannot be opened."""
    found: list[Problem] = []
    opened: dict[object, Checkpoint] = {}
    base = _open(spec.base_model, None, "base_model", found, opened, allow_pickle)
    experts: dict[str, Checkpoint] = {}
    for path, expert in spec.slots():
        checkpoint = _open(expert.source_model, base, f"{path}.source_model", found, opened, allow_pickle)
        if checkpoint is not None:
            experts[path] = checkpoint
    if base is None:
        for checkpoint in experts.values():
            checkpoint.close()
        return None, found
    return Models(base, experts), found


def _open(
    source: object,
    base: Checkpoint | None,
    where: str,
    found: list[Problem],
    opened: dict[object, Checkpoint],
    allow_pickle: bool,
) -> Checkpoint | None:
    """Open a model once."""
    key = source if isinstance(source, str) else id(source)
    if key not in opened:
        try:
            opened[key] = _opened(source, base, where, allow_pickle)
        except SpecError as error:  # of a merge
            found += [Problem(f"{where}.{problem.where}", problem.message) for problem in error.problems]
        except ToolkitError as error:
            found.append(Problem(where, str(error)))
    return opened.get(key)


def _opened(source: object, base: Checkpoint | None, where: str, allow_pickle: bool) -> Checkpoint:
    """Open a model; a change of a base that names no model of its own is one of `base`, or brings its own."""
    if isinstance(source, MergeSpec):
        return open_merge(source, where, allow_pickle=allow_pickle)
    own, change = change_of(source)
    if change is None:
        return open_checkpoint(source, allow_pickle=allow_pickle)
    if own is None and base is not None:
        return on_base(base, change)
    return on_base(open_checkpoint(own or change.base_model or "", allow_pickle=allow_pickle), change)


def check_models(architecture: Architecture, models: Models) -> list[Problem]:
    """Return what keeps models from making a mixture."""
    found = list(_base_faults(architecture, models))
    if found:
        return found
    first = next(iter(models.experts), None)
    for path, expert in models.experts.items():
        where = f"{path}.source_model"
        kind = expert.config.get("model_type")
        if kind not in architecture.inputs:
            found.append(Problem(where, f"is of type {kind}, not {' or '.join(sorted(architecture.inputs))}"))
            continue
        assert first is not None
        faults = [*_mlp_faults(models, expert, models.experts[first], first), *_config_faults(models.base, expert)]
        found += [Problem(where, fault) for fault in faults]
    return found


def _base_faults(architecture: Architecture, models: Models) -> Iterator[Problem]:
    base = models.base
    if base.config.get("quantization_config"):
        yield Problem("base_model", "is quantized; name the weights that it was made from")
        return
    layer = [f"self_attn.{p}_proj" for p in "qkvo"] + ["input_layernorm", "post_attention_layernorm"]
    needed = [f"model.layers.{i}.{module}.weight" for i in range(models.num_layers) for module in layer]
    needed += [EMBEDDINGS, "model.norm.weight"] + ([] if base.ties_head else ["lm_head.weight"])
    absent = [name for name in needed if name not in base.tensors]
    if absent or not models.num_layers:
        yield Problem("base_model", f"lacks {absent[0] if absent else 'layers'} ({len(absent)} such tensors)")
    strange = [name for name in base.tensors if not has_place(architecture, name)]
    if strange:
        yield Problem("base_model", f"{architecture.name} has no place for {strange[0]} ({len(strange)} such tensors)")
    packed = [name for name, info in base.tensors.items() if not info.dtype.floating]
    if packed and not strange:
        yield Problem("base_model", f"{packed[0]} is stored as {base.info(packed[0]).dtype.name}, not as floats")


def has_place(architecture: Architecture, name: str) -> bool:
    """Tell whether a tensor of the base has a place in the mixture, or needs none."""
    if name in (EMBEDDINGS, "model.norm.weight", "lm_head.weight"):
        return True
    inside = name.removeprefix("model.layers.").partition(".")[2] if name.startswith("model.layers.") else ""
    part, _, rest = inside.partition(".")
    if part == "self_attn":
        return rest in architecture.attention or is_buffer(name)
    if part == "mlp":
        return rest in [f"{projection}.weight" for projection in PROJECTIONS]
    return inside in ("input_layernorm.weight", "post_attention_layernorm.weight")


def is_buffer(name: str) -> bool:
    """Tell whether a tensor is one that old checkpoints store although it follows from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _mlp_faults(models: Models, expert: Checkpoint, first: Checkpoint, first_path: str) -> Iterator[str]:
    """Yield how an expert's MLPs differ from the first expert's, and from what the base's residual stream needs."""
    hidden = models.base.info(EMBEDDINGS).shape[1]
    wrong: list[str] = []
    for layer in range(models.num_layers):
        for projection in PROJECTIONS:
            name = mlp_name(layer, projection)
            if not expert.has(name):
                wrong.append(f"lacks {name}")
                continue
            info = expert.info(name)
            wanted = first.info(name).shape if first.has(name) else info.shape
            if info.shape != wanted:
                wrong.append(f"{name}: shape {list(info.shape)}, but {list(wanted)} in {first_path}")
            elif info.shape[0 if projection == "down_proj" else 1] != hidden:
                wrong.append(f"{name}: shape {list(info.shape)}, but the base has a hidden size of {hidden}")
            elif not info.dtype.floating:
                wrong.append(f"{name} is stored as {info.dtype.name}, not as floats")
    if wrong:
        yield wrong[0] + (f", and {len(wrong) - 1} more such tensors" if len(wrong) > 1 else "")
    if expert.has(mlp_name(models.num_layers, PROJECTIONS[0])):
        yield f"has more layers than the {models.num_layers} of the base"


def _config_faults(base: Checkpoint, expert: Checkpoint) -> Iterator[str]:
    given, wanted = (c.config.get("hidden_act", "silu") for c in (expert, base))
    if given != wanted:
        yield f"its activation is {given}, but {wanted} in the base"
    if isinstance(expert, AdaptedCheckpoint) and not any(".mlp." in name for name in touched(expert)):
        yield "the adapter changes no MLP, so the expert would be its base"
    if expert.folder is None or expert.folder != base.folder:
        yield from _vocabulary_faults(base, expert)


def touched(model: AdaptedCheckpoint) -> list[str]:
    """Name the tensors of a model that its adapter changes."""
    return [name for name in model.tensors if model.delta.touches(name)]


def _vocabulary_faults(base: Checkpoint, expert: Checkpoint) -> Iterator[str]:
    """Yield how tokens differ; further tokens do no harm, since those of the base are what the mixture reads."""
    try:
        ours, theirs = (read_tokenizer(c.folder, c.source).vocabulary for c in (base, expert))
    except ToolkitError:
        rows = [c.info(EMBEDDINGS).shape[0] if c.has(EMBEDDINGS) else 0 for c in (expert, base)]
        if rows[0] != rows[1]:
            yield f"has {rows[0]} tokens, but the base {rows[1]}, and no tokenizer.json says which are the same"
        return
    fault = other_tokens(ours, theirs)
    if fault:
        yield f"its vocabulary is another: {fault} in the base"
