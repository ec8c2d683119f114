"""The rows of the table: every way to make one model, or a small set of files, of eight fine-tunes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import toolkit
from benchmarks.eight_tasks.study import Scores, Study
from toolkit.checkpoints.adapters import open_adapter
from toolkit.checkpoints.compressed import open_compressed
from toolkit.merge.run import merge

Row = dict[str, Any]
"""`accuracy` by task on the test rows, `bytes` of all that is stored, `data` that was looked at, and settings."""

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
"""What a merged change is multiplied with; the best on the validation rows is taken."""

FIRST = 0.5
"""The one that is tried first, with those beside it; then on to the better side for as long as it gets better."""

MATRICES = {"average": [{"filter": "embeddings", "value": True}, {"value": False}]}
"""Of methods for the matrices of linear layers: embeddings, whose rows are tokens, are averaged."""

STATIC: dict[str, tuple[Mapping[str, Any], bool]] = {
    "weight averaging": ({"merge_method": "linear", "parameters": {"weight": 1}}, False),
    "task arithmetic": ({"merge_method": "task_arithmetic"}, True),
    "TIES": (
        {"merge_method": "ties", "parameters": {"preset": "paper", "density": 0.2, "normalize": False}},
        True,
    ),
    "DARE": ({"merge_method": "dare_linear", "parameters": {"preset": "paper", "density": 0.5}}, True),
    "DELLA": (
        {"merge_method": "della", "parameters": {"density": 0.5, "epsilon": 0.15, "normalize": False}},
        True,
    ),
    "breadcrumbs": ({"merge_method": "breadcrumbs", "parameters": {"density": 0.9, "gamma": 0.01}}, True),
    "model stock": ({"merge_method": "model_stock"}, False),
    "SCE": ({"merge_method": "sce", "parameters": {"select_topk": 0.1}}, False),
    "TSV-M": ({"merge_method": "tsv", "parameters": MATRICES}, True),
    "Iso-C": ({"merge_method": "iso_c", "parameters": MATRICES}, True),
    "consensus": ({"merge_method": "consensus", "parameters": {"k": 2, "mask_lambda": 0.4}}, True),
}
"""Merges without learning -> their spec, and whether their change is scaled."""

RANDOM = ("dare_linear", "della")

LABELLED = "validation rows and labels"
UNLABELLED = "validation texts, without labels"


def learned(study: Study) -> dict[str, Mapping[str, Any]]:
    """Return the learned merges: method and parameters of each."""
    # Adam moves a coefficient by at most its rate in a step, so this one reaches as far as 500 steps of the paper's.
    far = 0.5 / max(1, study.settings.steps)
    supervised = {"loss": "cross_entropy"}
    return {
        "AdaMerging (task)": {"method": "adamerging", "granularity": "task", "learning_rate": far},
        "AdaMerging (layer)": {"method": "adamerging", "granularity": "tensor", "learning_rate": far},
        "AdaMerging++ (layer)": {
            "method": "adamerging",
            "granularity": "tensor",
            "learning_rate": far,
            "density": 0.2,
        },
        "aTLAS": {"method": "atlas", "learning_rate": 4 * far, **supervised},
        "Self Positioning": {"method": "self_positioning", **supervised},
    }


def all_rows(study: Study) -> dict[str, Row]:
    """Measure every row that is not measured yet."""
    jobs: dict[str, Callable[[], Row]] = {
        "zero-shot": lambda: _one_model(study, study.base, "heads only"),
        "individual": lambda: _individual(study),
        "joint training": lambda: _one_model(study, str(study.folder / "joint"), "all training rows at once"),
    }
    jobs |= {name: lambda name=name: _static(study, name) for name in STATIC}
    jobs |= {name: lambda n=name, p=given: _learned(study, n, p) for name, given in learned(study).items()}
    jobs |= {
        "TALL masks": lambda: _masks(study),
        "TALL masks, 16-bit vector": lambda: _masks_in_half(study),
        "1-bit deltas": lambda: _extracted(study, "bit", {"embeddings": True}),
        "low-rank deltas": lambda: _extracted(study, "svd", {"rank": 16}),
    }
    return {name: study.row(name, job) for name, job in jobs.items()}


def nbytes(study: Study, source: str) -> int:
    """Return the bytes of the weights of one full model."""
    with study.open(source) as weights:
        return weights.nbytes


def _one_model(study: Study, source: str, data: str) -> Row:
    study.use(source)
    return {"accuracy": study.measure("test"), "bytes": nbytes(study, study.base), "data": data}


def _individual(study: Study) -> Row:
    accuracy, base = study.measure_each(study.individual, "test"), nbytes(study, study.base)
    adapters = [open_adapter(model) for model in study.individual.values()] if study.settings.rank else []
    stored = base + sum(adapter.nbytes for adapter in adapters) if adapters else len(accuracy) * base
    for adapter in adapters:
        adapter.close()
    return {"accuracy": accuracy, "bytes": stored, "data": "training rows"}


def _static(study: Study, name: str) -> Row:
    template, scaled = STATIC[name]
    spec = {**template, "models": [{"model": model} for model in study.individual.values()], "base_model": study.base}
    if template["merge_method"] in RANDOM:
        spec["seed"] = study.seed
    out = study.folder / "merged"
    merge(spec, out, overwrite=True, quiet=study.quiet)
    study.use(str(out))
    row: Row = {"bytes": nbytes(study, study.base), "data": "none"}
    if scaled:
        row["scale"], row["validation"] = _best_scale(study)
        row["data"] = f"{LABELLED}, for one number"
    row["accuracy"] = study.measure("test")
    study.forget("merged")
    return row


def _best_scale(study: Study) -> tuple[float, Mapping[str, float]]:
    """Scale the change of the model as it stands, the best of `SCALES`; the model has it then."""
    change = study.change()
    found: dict[float, float] = {}

    def score(scale: float) -> float:
        if scale not in found:
            study.place(change, scale)
            found[scale] = mean(study.measure("validation"))
        return found[scale]

    best = FIRST
    while True:
        at = SCALES.index(best)
        better = max(SCALES[max(0, at - 1) : at + 2], key=score)
        if score(better) == score(best):
            break
        best = better
    study.place(change, best)
    return best, {str(scale): found[scale] for scale in sorted(found)}


def learn_spec(study: Study, given: Mapping[str, Any], shift: str | None = None) -> dict[str, Any]:
    """Return the spec of a learned merge of the fine-tunes, on the validation rows."""
    files = study.rows("validation", shift)
    tasks = {n: {"data": f, "head": str(study.folder / "heads" / n)} for n, f in files.items()}
    parameters = {"steps": study.settings.steps, "batch_size": study.settings.batch_size, "seed": study.seed}
    spec = {"base_model": study.base, "models": study.individual, "tasks": tasks, "max_length": 128, "keep": "2GB"}
    return spec | {
        "method": given["method"],
        "parameters": parameters | {k: v for k, v in given.items() if k != "method"},
    }


def run_learned(study: Study, name: str, given: Mapping[str, Any], shift: str | None = None) -> Path:
    """Learn a merge, or go on with one that was stopped; return its folder."""
    folder = name.replace(" ", "_") + (f"-{shift}" if shift else "")
    out = study.folder / "learned" / folder
    if not out.is_dir():
        toolkit.learn(learn_spec(study, given, shift), out, resume=True, quiet=study.quiet)
    return out


def _learned(study: Study, name: str, given: Mapping[str, Any]) -> Row:
    out = run_learned(study, name, given)
    study.use(str(out / "merged"))
    data = LABELLED if given.get("loss") == "cross_entropy" else UNLABELLED
    return {"accuracy": study.measure("test"), "bytes": nbytes(study, study.base), "data": data}


def _masks(study: Study) -> Row:
    out = study.folder / "learned" / "TALL_masks"
    if not out.is_dir():
        spec = learn_spec(study, {"method": "tall_masks"})
        toolkit.learn(spec | {"parameters": {}}, out, quiet=study.quiet)
    return _of_folder(study, out / "compressed", f"{LABELLED}, for a number per task")


def _masks_in_half(study: Study) -> Row:
    with_masks = open_compressed(study.folder / "learned" / "TALL_masks" / "compressed")
    chosen: Mapping[str, float] = with_masks.config["lambda"]
    with_masks.close()
    options = {"lambda": [chosen[name] for name in study.tasks], "dtype": "float16"}
    return _extracted(study, "mask", options) | {"data": f"{LABELLED}, for a number per task"}


def _extracted(study: Study, kind: Any, options: Mapping[str, Any]) -> Row:
    out = study.folder / "extracted"
    toolkit.extract(study.base, study.individual, out, kind=kind, overwrite=True, quiet=study.quiet, **options)
    row = _of_folder(study, out, "none")
    study.forget("extracted")
    return row


def _of_folder(study: Study, folder: Path, data: str) -> Row:
    accuracy = study.measure_each({name: f"{folder}#{name}" for name in study.tasks}, "test")
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"accuracy": accuracy, "bytes": nbytes(study, study.base) + stored, "data": data}


def mean(scores: Scores) -> float:
    """Return the mean over tasks."""
    return sum(scores.values()) / len(scores)
