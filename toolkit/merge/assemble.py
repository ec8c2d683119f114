"""Which tensors of which inputs go into which tensor of the output, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.checkpoints.layout import Layout, is_head, layer_of, role_of
from toolkit.checkpoints.reader import Checkpoint
from toolkit.errors import Problem
from toolkit.merge.inputs import GroupInputs, Input, Inputs
from toolkit.merge.vocabulary import TOKENIZER_BLOCK, has_vocabulary

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of layers."""


@dataclass(frozen=True)
class Piece:
    """One tensor of the output.

    Attributes:
        name: of the tensor.
        donor: checkpoint and name of the tensor whose dtype and shape it has.
        group: that merges it; `None` where the donor's is copied.
        source_names: its name in each input of the group.
        base_name: its name in the group's base.
        depth: from 0 (embeddings, first layer) to 1 (last layer, final norm, head), for anchors over the layers.
    """

    name: str
    donor: tuple[Checkpoint, str]
    group: GroupInputs | None = None
    source_names: tuple[str, ...] = ()
    base_name: str = ""
    depth: float = 0.0


def assemble(inputs: Inputs) -> tuple[list[Piece], dict[str, Any], list[Problem]]:
    """Return the tensors of the output, what changes in the donor's config, and what does not fit."""
    if inputs.groups[0].group.is_slice:
        return _assemble_slices(inputs.groups)
    found = _unknown_modules(inputs)
    if found:
        return [], {}, found
    pieces: dict[str, Piece] = {}
    for group in inputs.groups:
        names = _output_names(group)
        found += _misfits(group, names)
        layout = Layout(names)
        for name in names:
            names_of_all = (name,) * len(group.models)
            pieces[name] = Piece(name, (group.donor, name), group, names_of_all, name, layout.depth(name))
    for name in inputs.donor.tensors if inputs.groups[0].group.module else ():
        pieces.setdefault(name, Piece(name, (inputs.donor, name)))  # of no module: the donor's
    return list(pieces.values()), {}, found


def _unknown_modules(inputs: Inputs) -> list[Problem]:
    found = []
    for group in inputs.groups:
        if not any(group.group.holds(name) for name in inputs.donor.tensors):
            known = sorted({name.rpartition(".")[0].split(".layers.")[0] for name in inputs.donor.tensors})
            where = group.group.path.rpartition(".")[0]
            found.append(Problem(where, f"no tensor's name begins so (there are {', '.join(known[:8])}; or default)"))
    return found


def _output_names(group: GroupInputs) -> list[str]:
    """Name a group's tensors: the donor's, and an output head where any model has one of its own.

    A head that a model stores although its config ties it is a copy of the embedding, and left out.
    """
    models = [group.donor, *(m.weights for m in group.models)]
    apart = {name for m in models if not m.ties_head for name in m.tensors if is_head(name)}
    names = [name for name in group.donor.tensors if not is_head(name) or name in apart]
    names += sorted(name for name in apart if name not in names)
    return [name for name in names if group.group.holds(name)]


def _misfits(group: GroupInputs, names: Sequence[str]) -> list[Problem]:
    """Find tensors that a model lacks, has besides, or has in another shape than the donor."""
    donor, known = group.donor, set(names)
    found: list[Problem] = []
    for model in group.models:
        where = f"{model.slot.path}.model"
        lacking = [n for n in names if not model.weights.has(n)]
        inside = [n for n in model.weights.tensors if group.group.holds(n)]
        extra = [n for n in inside if n not in known and not is_head(n)]
        both = known.difference(lacking)
        shapes = [n for n in names if n in both and model.weights.info(n).shape != donor.info(n).shape]
        if lacking:
            found.append(Problem(where, f"lacks {_some(lacking)} that {donor.source} has"))
        if extra:
            found.append(Problem(where, f"has {_some(extra)} that {donor.source} does not have"))
        if shapes:
            given, wanted = model.weights.info(shapes[0]).shape, donor.info(shapes[0]).shape
            message = f"{_some(shapes)}: shape {list(given)}, but {list(wanted)} in {donor.source}"
            hint = f"; {TOKENIZER_BLOCK}" if all(map(has_vocabulary, shapes)) else ""
            found.append(Problem(where, message + hint))
    return found


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def _assemble_slices(groups: Sequence[GroupInputs]) -> tuple[list[Piece], dict[str, Any], list[Problem]]:
    """Put layers one stretch after another, between what stands before the first slice's and after the last's."""
    found = [problem for group in groups for problem in _wrong_layers(group)]
    if found:
        return [], {}, found
    before, after = groups[0], groups[-1]
    pieces = [_piece(before, name, 0, 0, 0.0) for name in _output_names(before) if _is_outer(name, "embedding")]
    first = 0
    for group in groups:
        pieces += _layers_of(group, first)
        first += _length(group)
    pieces += [_piece(after, name, 0, 0, 1.0) for name in _output_names(after) if _is_outer(name)]
    found = [problem for piece in pieces for problem in _wrong_shapes(piece)]
    return pieces, _layer_config(groups, first), found


def _is_outer(name: str, role: str = "") -> bool:
    """Tell whether a tensor is of no layer, and an embedding where that is asked for, or else none."""
    return layer_of(name) is None and (role_of(name) == "embedding") == bool(role)


def _layers_of(group: GroupInputs, first: int) -> list[Piece]:
    """Return the tensors of a group's layers, the first of which has the number `first` in the output."""
    length, begin = _length(group), _layers(group.models[0])[0]
    found = []
    for name in group.models[0].weights.tensors:
        _, number = layer_of(name) or ("", -1)
        offset = number - begin
        if 0 <= offset < length:
            found.append(_piece(group, name, first + offset, offset, offset / (length - 1) if length > 1 else 0.0))
    return sorted(found, key=lambda piece: layer_of(piece.name) or ("", 0))


def _wrong_layers(group: GroupInputs) -> Iterator[Problem]:
    lengths = {_length_of(model) for model in group.models}
    if len(lengths) > 1:
        ranges = ", ".join(str(list(_layers(model))) for model in group.models)
        yield Problem(group.group.path, f"the layer ranges differ in length ({ranges})")
    for model in group.models:
        counts = Layout(model.weights.tensors).num_layers
        if len(counts) != 1:
            stacks = ", ".join(counts) or "none"
            yield Problem(f"{model.slot.path}.model", f"slices need one stack of layers, this model has {stacks}")
        elif _layers(model)[1] > max(counts.values()):
            last = max(counts.values())
            yield Problem(f"{model.slot.path}.layer_range", f"{list(_layers(model))}, but the model has {last} layers")


def _wrong_shapes(piece: Piece) -> Iterator[Problem]:
    assert piece.group is not None
    checkpoint, name = piece.donor
    wanted = checkpoint.info(name).shape
    for model, source in zip(piece.group.models, piece.source_names, strict=True):
        where = f"{model.slot.path}.model"
        if not model.weights.has(source):
            yield Problem(where, f"lacks {source}")
        elif model.weights.info(source).shape != wanted:
            given = list(model.weights.info(source).shape)
            yield Problem(where, f"{source}: shape {given}, but {list(wanted)} in {checkpoint.source}")


def _piece(group: GroupInputs, name: str, layer: int, offset: int, depth: float) -> Piece:
    """Return the output tensor that the first source's `name` becomes, in layer `layer` if it is of a layer."""
    names = tuple(_renumbered(name, _layers(model)[0] + offset) for model in group.models)
    # The base's layer is the one that its own slot names, else that of the first source.
    own = next((slot.layers for slot in group.group.slots if slot.model == group.group.base_model), None)
    base_name = _renumbered(name, own[0] + offset) if own else names[0]
    return Piece(_renumbered(name, layer), (group.models[0].weights, names[0]), group, names, base_name, depth)


def _renumbered(name: str, layer: int) -> str:
    """Put another layer's number into a tensor's name."""
    found = layer_of(name)
    if found is None:
        return name
    stack, number = found
    return f"{stack}.{layer}{name[len(stack) + 1 + len(str(number)) :]}"


def _layers(model: Input) -> tuple[int, int]:
    assert model.slot.layers is not None
    return model.slot.layers


def _length_of(model: Input) -> int:
    first, last = _layers(model)
    return last - first


def _length(group: GroupInputs) -> int:
    return _length_of(group.models[0])


def _layer_config(groups: Sequence[GroupInputs], total: int) -> dict[str, Any]:
    """Return what the number of layers changes in the donor's config, wherever it stands there."""
    donor = groups[0].donor.config
    nested = donor.get("text_config")
    if isinstance(nested, dict) and any(key in nested for key in LAYER_COUNTS):
        return {"text_config": nested | _counted(nested, groups, total, "text_config")}
    return _counted(donor, groups, total, None)


def _counted(config: dict[str, Any], groups: Sequence[GroupInputs], total: int, inner: str | None) -> dict[str, Any]:
    changes: dict[str, Any] = {key: total for key in LAYER_COUNTS if key in config}
    if isinstance(config.get("layer_types"), list):
        kinds: list[Any] = []
        for group in groups:
            first, last = _layers(group.models[0])
            source = group.models[0].weights.config
            kinds += (source.get(inner, source) if inner else source).get("layer_types", [])[first:last]
        changes["layer_types"] = kinds
    return changes
