"""The data that a spec names, for methods that measure models on it."""

from __future__ import annotations

from pathlib import Path

from toolkit.errors import Problem
from toolkit.merge.method import Method
from toolkit.merge.spec import MergeSpec


def check_data(spec: MergeSpec, method: Method) -> list[Problem]:
    """Find models whose data is not named, or named and not used, or not there."""
    shared = spec.data.files if spec.data else None
    if method.statistics is None:
        given = [f"models[{i}].data" for i, model in enumerate(spec.models or ()) if model.data]
        given += ["data"] if spec.data else []
        return [Problem(where, f"{method.name} measures nothing on data") for where in given]
    if spec.models is None:
        return [Problem("merge_method", f"{method.name} measures whole models; give models, not slices or modules")]
    if spec.output.type != "checkpoint":
        return [Problem("output.type", f"{method.name} writes a checkpoint")]
    found = []
    for i, model in enumerate(spec.models):
        where = f"models[{i}].data" if model.data else "data.files"
        files = model.data or shared
        if not files:
            found.append(
                Problem(f"models[{i}].data", f"required by {method.name}: JSONL files of the model's own task")
            )
        found += [
            Problem(where, f"{file}: no such file") for file in files or () if not Path(file).expanduser().is_file()
        ]
    return list(dict.fromkeys(found))


def data_files(spec: MergeSpec) -> set[Path]:
    """Return the files of data that the result depends on."""
    named = [*((spec.data.files or ()) if spec.data else ())]
    named += [file for model in spec.models or () for file in model.data or ()]
    return {Path(file).expanduser() for file in named}
