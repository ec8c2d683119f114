"""Write adapters of other types as LoRA: exactly where they are pairs of factors, else by the best pairs of a rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoints.adapters import CONFIG, WEIGHTS, LowRank
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import read_json
from toolkit.checkpoints.writer import check_free, staged
from toolkit.errors import CheckpointError, MissingError, SpecError, UnsupportedError
from toolkit.models.load import load_model, quiet_transformers
from toolkit.progress import track
from toolkit.tables import Report, Table, human_bytes

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

RANK = 16
"""Where none is asked for."""


def load_adapted(adapter: str | Path, base: Any = None, **options: Any) -> PeftModel:
    """Load an adapter on its base, float32 unless said otherwise, in evaluation mode.

    Args:
        adapter: a folder or a hub id.
        base: model to put it on; by default the one that it names.
        options: of `load_model`.

    Raises:
        MissingError: no adapter there, or no base is known.
        CheckpointError: it does not fit the base.
        UnsupportedError: a type that PEFT does not know.
    """
    import torch
    from peft import PeftModel

    folder = locate(str(adapter))
    if not (folder / CONFIG).is_file():
        raise MissingError(f"{adapter}: no {CONFIG} in this folder")
    source = base or read_json(folder / CONFIG).get("base_model_name_or_path")
    if not source:
        raise MissingError(f"{adapter}: names no base; give it with --base")
    given: dict[str, Any] = {"dtype": torch.float32} | options
    model = load_model(source, **given).model
    try:
        with quiet_transformers():
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except KeyError as error:
        raise UnsupportedError(f"{adapter}: PEFT knows no type {error}") from None
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{adapter}: does not load on {source} ({' '.join(str(error).split())[:300]})") from None


def fold_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: Any = None,
    task: int | str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Write an adapter as the LoRA that it is exactly.

    Args:
        adapter: a folder or a hub id.
        out: folder to write.
        base: model that it is for; by default the one that it names.
        task: of a POLY adapter: a number, or `unknown`.
        overwrite: replace `out` if it exists.
        trust_remote_code: run code that comes with the base.

    Raises:
        UnsupportedError: it is no pair of factors; `convert` may come near.
        SpecError: a task that does not go with it.
        MissingError, CheckpointError: no such adapter or base.
        OutputError: `out` exists.
    """
    check_free(Path(out), overwrite=overwrite)
    from toolkit.adapters.fold import fold

    model = load_adapted(adapter, base, trust_remote_code=trust_remote_code)
    named: Any = int(task) if isinstance(task, str) and task.isdecimal() else task
    try:
        folder = fold(model, out, task=named, overwrite=overwrite)
    except (TypeError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"task: {error}") from None
    return _report("fold", folder, {}, _kind(model))


def convert_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: Any = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Report:
    """Write an adapter of any type that changes weights as LoRA, by the best pairs.

    Args:
        adapter: a folder or a hub id.
        out: folder to write.
        rank: of every pair; 16 by default, or the smaller side of a matrix.
        energy: instead, the share of each change's squared Frobenius norm that is kept.
        base: model that it is for; by default the one that it names.
        overwrite: replace `out` if it exists.
        trust_remote_code: run code that comes with the base.
        quiet: show no progress.

    Raises:
        UnsupportedError: it is more than a change of weights of linears.
        SpecError: both rank and energy, or a value that means nothing.
        MissingError, CheckpointError: no such adapter or base.
        OutputError: `out` exists.
    """
    if rank is not None and energy is not None:
        raise SpecError("give one of rank and energy")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise SpecError(f"expected a rank of at least 1, or an energy above 0 and up to 1, got {rank or energy}")
    check_free(Path(out), overwrite=overwrite)
    model = load_adapted(adapter, base, trust_remote_code=trust_remote_code)
    pairs: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    count = sum(1 for _ in _layers(model))
    with track("converting", count, unit="modules", quiet=quiet) as progress:
        for name, change in changes(model):
            pairs[name], errors[name] = _factor(change, rank, energy)
            progress.advance()
    with staged(Path(out), overwrite=overwrite) as partial:
        _write(partial, pairs, model)
    return _report("convert", Path(out), errors, _kind(model))


def changes(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Yield what the active adapter changes each linear's weight by, `[out, in]`, by names of modules.

    Raises:
        UnsupportedError: it is more than a change of weights of linears.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kind = _kind(model)
    for name, layer in _layers(model):
        module = layer.get_base_layer()
        if not isinstance(module, nn.Linear | Conv1D):
            raise UnsupportedError(
                f"{name}: {kind} adapts a {type(module).__name__} here, which no LoRA of linears does"
            )
        kept = {key: value.data.clone() for key, value in module.named_parameters()}
        before = {key: value.double() for key, value in kept.items()}
        try:
            with torch.no_grad():
                layer.merge()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedError(f"{name}: {kind} adapters are no change of weights ({error})") from None
        after = {key: value.detach().double() for key, value in layer.get_base_layer().named_parameters()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unmerge result can be inaccurate")
            layer.unmerge()
        for key, value in layer.get_base_layer().named_parameters():
            value.data = kept[key]
        if "bias" in before and not torch.equal(before["bias"], after["bias"]):
            raise UnsupportedError(f"{name}: {kind} changes the bias too, which LoRA cannot; merge it instead")
        change = after["weight"] - before["weight"]
        yield name, change.T if isinstance(module, Conv1D) else change


def _layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    config: Any = model.peft_config["default"]
    found = [(n, m) for n, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)]
    if not found or config.is_prompt_learning or getattr(config, "modules_to_save", None):
        raise UnsupportedError(f"{_kind(model)} adapters here are more than a change of weights of linears")
    yield from found


def _factor(change: Tensor, rank: int | None, energy: float | None) -> tuple[LowRank, float]:
    """Return the best pair, and its relative error in the Frobenius norm."""
    from toolkit.merge.lowrank import factor
    from toolkit.merge.svd import rank_for_energy, singular_values

    matrix = change.float().numpy()
    if energy is not None:
        rank = max(rank_for_energy(singular_values(matrix), energy), 1)
    return factor(matrix, min(rank or RANK, *matrix.shape), False)


def _write(folder: Path, pairs: Mapping[str, LowRank], model: PeftModel) -> None:
    import json

    import torch
    from safetensors.torch import save_file
    from transformers.pytorch_utils import Conv1D

    from toolkit.checkpoints.writer import write_text
    from toolkit.merge.lowrank import adapter_config, pair_names

    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        a, b = pair_names(name, embedding=False)
        tensors[a], tensors[b] = (torch.from_numpy(values.copy()) for values in (pair.cols, pair.rows))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    own: Any = model.peft_config["default"]
    flipped = all(isinstance(layer.get_base_layer(), Conv1D) for _, layer in _layers(model))
    config = adapter_config(
        {name: pair.rank for name, pair in pairs.items()},
        own.base_model_name_or_path,
        task_type=own.task_type,
        fan_in_fan_out=flipped,
    )
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _kind(model: PeftModel) -> str:
    config: Any = model.peft_config["default"]
    return str(config.peft_type.value)


def _report(title: str, folder: Path, errors: Mapping[str, float], kind: str) -> Report:
    size = (folder / WEIGHTS).stat().st_size
    numbers = {"path": str(folder), "from": kind, "bytes": size, "relative_error": dict(errors)}
    rows = [["from", kind], ["written", human_bytes(size)]]
    if errors:
        rows.insert(1, ["largest relative error of a module", f"{max(errors.values()):.2g}"])
        rows.insert(1, ["modules", str(len(errors))])
    return Report(numbers, [Table((title, str(folder)), rows)])
