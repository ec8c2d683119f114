"""Merge several LoRAs of one base into one LoRA folder.

Where the merged delta is a weighted sum, the pairs are concatenated along their rank, which is exact: mixing the
factors apart, `(sum A)(sum B)`, is not. Any other merged delta is computed and factored by a singular value
decomposition, with the relative error of every tensor reported.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.checkpoints.adapters import CONFIG, WEIGHTS, Adapter, LowRank
from toolkit.checkpoints.companions import write_card
from toolkit.checkpoints.dtypes import DTYPES, DType, Floats, encode
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.writer import staged, write_text, write_weights
from toolkit.errors import CheckpointError, Problem
from toolkit.merge.finite import is_finite
from toolkit.merge.inputs import Input, unnamed_base
from toolkit.merge.job import Job, Place
from toolkit.merge.plan import Plan, make_plan
from toolkit.merge.record import Companions
from toolkit.merge.run import MergeResult
from toolkit.merge.spec import MergeSpec
from toolkit.merge.stream import Scratch, Stream, survey
from toolkit.merge.svd import leading
from toolkit.progress import track
from toolkit.tables import Table, human_bytes

PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""


@dataclass(frozen=True)
class Pair:
    """The merged pair of one module, and how far `scale * rows @ cols` is from the merged delta, relatively."""

    module: str
    low_rank: LowRank
    error: float


def merge_adapters(
    spec: MergeSpec,
    out: Path,
    beside: Companions,
    *,
    overwrite: bool = False,
    allow_pickle: bool = False,
    quiet: bool = False,
) -> MergeResult:
    """Merge the LoRAs of a spec and write one LoRA folder.

    Raises:
        SpecError: an input is not a LoRA of the base, or stores whole modules.
        CheckpointError: an input, or the base where it matters, holds NaN or infinity.
    """
    started = time.perf_counter()
    plan = make_plan(spec, allow_pickle=allow_pickle)
    try:
        adapters = _adapters(plan)
        _check_finite(adapters)
        surveyed = survey(plan)
        jobs = [job for job in plan.jobs if any(job.tensor.name in a.targets for a in adapters)]
        with track("merging adapters", len(jobs), unit="modules", quiet=quiet) as progress:
            pairs: list[Pair] = []
            for job in jobs:
                pairs.append(_merge_module(plan, adapters, job, surveyed.get(job.tensor.name)))
                progress.advance()
        dtype = plan.dtype or DTYPES["F32"]
        with staged(out, overwrite=overwrite) as partial:
            write_adapter(partial, pairs, adapters[0], dtype, plan.inputs.donor.source)
            files = beside.write_record(plan, spec, partial, modules=len(pairs))
            if beside.card:
                _write_card(plan, partial, pairs, files)
    finally:
        plan.inputs.close()
    return _result(plan, out, pairs, time.perf_counter() - started)


def recompress(pair: LowRank, rank: int) -> tuple[LowRank, float]:
    """Return the best pair of at most `rank`, and its relative error in the Frobenius norm; exact arithmetic aside."""
    q_rows, r_rows = np.linalg.qr(pair.rows.astype(np.float64))
    q_cols, r_cols = np.linalg.qr(pair.cols.T.astype(np.float64))
    u, s, vt = np.linalg.svd(pair.scale * (r_rows @ r_cols.T))
    return _truncate(q_rows @ u, s, vt @ q_cols.T, rank, pair.transposed)


def factor(delta: Floats, rank: int, transposed: bool) -> tuple[LowRank, float]:
    """Return the best pair of at most `rank` for a whole matrix `[M, N]`, and its relative error."""
    return _balanced(*leading(delta, rank), transposed)


def adapter_config(ranks: Mapping[str, int], base: str, **more: Any) -> dict[str, Any]:
    """Return the `adapter_config.json` of a LoRA whose scale is 1 everywhere.

    Args:
        ranks: of the pair of each adapted module.
        base: model that the adapter is for.
        more: further keys, and other values of these.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    } | more


def pair_names(module: str, embedding: bool) -> tuple[str, str]:
    """Return what PEFT calls the factors A and B of a module."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    return f"{PREFIX}{module}.{a}", f"{PREFIX}{module}.{b}"


def write_adapter(out: Path, pairs: Sequence[Pair], like: Adapter, dtype: DType, base: str) -> None:
    """Write pairs as a PEFT LoRA folder whose scale is 1 everywhere."""
    config = adapter_config(
        {pair.module: pair.low_rank.rank for pair in pairs},
        base,
        task_type=like.config.get("task_type") or "CAUSAL_LM",
        fan_in_fan_out=bool(like.config.get("fan_in_fan_out")),
    )
    tensors: list[TensorInfo] = []
    data = {}
    for pair in pairs:
        low, embedding = pair.low_rank, like.parts[pair.module].embedding if pair.module in like.parts else False
        a, b = (low.rows.T, low.cols.T) if low.transposed else (low.cols, low.rows)
        for name, values in zip(pair_names(pair.module, embedding), (a, b), strict=True):
            tensors.append(TensorInfo(name, dtype, values.shape))
            data[name] = encode(np.ascontiguousarray(values).reshape(-1), dtype)
    write_weights(out, tensors, data, stem=WEIGHTS.removesuffix(".safetensors"))
    write_text(out / CONFIG, json.dumps(config, indent=2) + "\n")


def _adapters(plan: Plan) -> list[Adapter]:
    found = unnamed_base(plan.spec)
    adapters: list[Adapter] = []
    if plan.spec.models is None:
        raise plan.spec.error([Problem("output.type", "an adapter is merged from models, not from slices or modules")])
    for model in plan.inputs.models:
        where = f"{model.slot.path}.model"
        if model.weights is plan.inputs.base:
            continue  # one more model to some methods, and no change of itself
        if model.adapter is None:
            found.append(Problem(where, "output.type is adapter, so every model must be a LoRA folder of the base"))
        elif model.adapter.whole:
            names = ", ".join(sorted(model.adapter.whole)[:3])
            found.append(Problem(where, f"stores {names} whole, which no LoRA can hold; use output.type: checkpoint"))
        else:
            adapters.append(model.adapter)
    if not found and len({bool(a.config.get("fan_in_fan_out")) for a in adapters}) > 1:
        found.append(Problem("models", "some adapters are for transposed weights (fan_in_fan_out), others are not"))
    if found:
        raise plan.spec.error(found)
    return adapters


def _check_finite(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        for name in adapter.store.tensors:
            if not is_finite(Place(adapter.store, name)):
                raise CheckpointError(f"{adapter.source}: {name} holds NaN or infinity")


def _merge_module(plan: Plan, adapters: Sequence[Adapter], job: Job, surveyed: Any) -> Pair:
    name = job.tensor.name
    with_it = [a for a in adapters if name in a.targets]
    module = with_it[0].targets[name]
    total = sum(a.rank(module) for a in with_it)
    limit = min(job.tensor.shape)
    wanted = plan.spec.output.rank
    rank = limit if wanted == "full" else min(limit, total if wanted is None else wanted)
    stream = Stream(job, plan.method, Scratch(), surveyed)
    factors = plan.method.coefficients(job.params, stream.state)
    if factors is not None and not any(a.parts[module].magnitude for a in with_it):
        pair = _concatenate(plan.inputs.models, factors, module)
        if pair.rank <= rank or wanted is None:
            return Pair(module, pair, 0.0)
        return Pair(module, *recompress(pair, rank))
    part = with_it[0].parts[module]
    transposed = part.embedding or bool(with_it[0].config.get("fan_in_fan_out"))
    return Pair(module, *factor(_dense(plan, stream), rank, transposed))


def _concatenate(models: Sequence[Input], factors: Sequence[float], module: str) -> LowRank:
    """Return the exact pair of `sum_i factor_i * delta_i`: ranks side by side."""
    rows, cols, transposed = [], [], False
    for model, coefficient in zip(models, factors, strict=True):
        if model.adapter and module in model.adapter.parts:
            pair = model.adapter.low_rank(module)
            rows.append(np.float32(coefficient * pair.scale) * pair.rows)
            cols.append(pair.cols)
            transposed = pair.transposed
    return LowRank(np.concatenate(rows, axis=1), np.concatenate(cols), 1.0, transposed=transposed)


def _dense(plan: Plan, stream: Stream) -> Floats:
    """Compute the merged delta of a whole matrix."""
    base, job = plan.inputs.base, stream.job
    assert base is not None
    delta = np.empty(job.tensor.count, np.float32)
    for start, merged in stream.merged():
        values = np.empty_like(merged)
        base.read(job.tensor.name, start, start + len(merged), values)
        np.subtract(merged, values, out=delta[start : start + len(merged)])
    if not np.isfinite(delta).all():
        raise CheckpointError(f"{base.source}: {job.tensor.name} holds NaN or infinity")
    return delta.reshape(job.tensor.shape)


def _truncate(u: Any, s: Any, vt: Any, rank: int, transposed: bool) -> tuple[LowRank, float]:
    return _balanced(u[:, :rank], s[:rank], vt[:rank], float(np.linalg.norm(s[rank:])), transposed)


def _balanced(u: Any, s: Any, vt: Any, rest: float, transposed: bool) -> tuple[LowRank, float]:
    """Share the singular values between both factors; `rest` is the norm of what they leave out."""
    norm = hypot(float(np.linalg.norm(s)), rest)
    root = np.sqrt(s)
    rows, cols = (u * root).astype(np.float32), (root[:, None] * vt).astype(np.float32)
    return LowRank(rows, cols, 1.0, transposed=transposed), rest / norm if norm else 0.0


def _write_card(plan: Plan, out: Path, pairs: Sequence[Pair], files: Table) -> None:
    sources = [m.weights.source for m in plan.inputs.models]
    worst = max(pair.error for pair in pairs)
    write_card(
        out,
        f"{plan.method.name} merge of {len(sources)} LoRAs",
        f"Merged from {', '.join(f'`{s}`' for s in sources)}. Largest relative error of a module: {worst:.2g}.",
        tags=["merge", "lora", plan.method.name],
        base=[plan.inputs.donor.source],
        spec=plan.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        details=files.to_markdown(),
        library="peft",
    )


def _result(plan: Plan, out: Path, pairs: Sequence[Pair], seconds: float) -> MergeResult:
    errors = {pair.module: pair.error for pair in pairs}
    ranks = sorted({pair.low_rank.rank for pair in pairs})
    size = sum(f.stat().st_size for f in out.iterdir() if f.suffix == ".safetensors")
    numbers = {
        "path": str(out),
        "method": plan.method.name,
        "modules": len(pairs),
        "ranks": ranks,
        "write_bytes": size,
        "seconds": round(seconds, 3),
        "relative_error": errors,
    }
    rows = [
        ["method", plan.method.name],
        ["inputs", len(plan.inputs.models)],
        ["modules", len(pairs)],
        ["rank", ", ".join(map(str, ranks))],
        ["largest relative error", f"{max(errors.values()):.2g}"],
        ["written", human_bytes(size)],
    ]
    return MergeResult(numbers, [Table(("merge", str(out)), rows)], out)
