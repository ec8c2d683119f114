"""Merge several LoRAs of one base into one LoRA folder.

Where the merged delta is a weighted sum, the pairs are concatenated along their rank, which is exact: mixing the
factors apart, `(sum A)(sum B)`, is not. Any other merged delta is computed and factored by a singular value
decomposition, with the relative error of every tensor reported.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.checkpoints.adapters import CONFIG, WEIGHTS, Adapter, LowRank
from toolkit.checkpoints.companions import write_card
from toolkit.checkpoints.dtypes import DTYPES, DType, Floats, encode
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.writer import staged, write_text, write_weights
from toolkit.errors import Problem
from toolkit.merge.inputs import Input
from toolkit.merge.plan import Job, Plan, make_plan
from toolkit.merge.run import MergeResult, Scratch, Stream, merged_chunks
from toolkit.merge.spec import MergeSpec
from toolkit.progress import track
from toolkit.tables import Table, human_bytes


@dataclass(frozen=True)
class Pair:
    """The merged pair of one module, and how far `scale * rows @ cols` is from the merged delta, relatively."""

    module: str
    low_rank: LowRank
    error: float


def merge_adapters(spec: MergeSpec, out: Path, *, overwrite: bool = False, quiet: bool = False) -> MergeResult:
    """Merge the LoRAs of a spec and write one LoRA folder.

    Raises:
        SpecError: an input is not a LoRA of the base, or stores whole modules.
    """
    started = time.perf_counter()
    plan = make_plan(spec)
    try:
        adapters = _adapters(plan)
        jobs = [job for job in plan.jobs if any(job.tensor.name in a.targets for a in adapters)]
        with track("merging adapters", len(jobs), unit="modules", quiet=quiet) as progress:
            pairs: list[Pair] = []
            for job in jobs:
                pairs.append(_merge_module(plan, adapters, job))
                progress.advance()
        dtype = plan.dtype or DTYPES["F32"]
        with staged(out, overwrite=overwrite) as partial:
            write_adapter(partial, pairs, adapters[0], dtype, plan.inputs.donor.source)
            _write_card(plan, partial, pairs)
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
    u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    return _truncate(u, s, vt, rank, transposed)


def write_adapter(out: Path, pairs: Sequence[Pair], like: Adapter, dtype: DType, base: str) -> None:
    """Write pairs as a PEFT LoRA folder whose scale is 1 everywhere."""
    ranks = {pair.module: pair.low_rank.rank for pair in pairs}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {module: rank for module, rank in ranks.items() if rank != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": like.config.get("task_type") or "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "fan_in_fan_out": bool(like.config.get("fan_in_fan_out")),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    tensors: list[TensorInfo] = []
    data = {}
    for pair in pairs:
        low, embedding = pair.low_rank, like.parts[pair.module].embedding if pair.module in like.parts else False
        a, b = (low.rows.T, low.cols.T) if low.transposed else (low.cols, low.rows)
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        for part, values in zip(names, (a, b), strict=True):
            name = f"base_model.model.{pair.module}.{part}"
            tensors.append(TensorInfo(name, dtype, values.shape))
            data[name] = encode(np.ascontiguousarray(values).reshape(-1), dtype)
    write_weights(out, tensors, data, stem=WEIGHTS.removesuffix(".safetensors"))
    write_text(out / CONFIG, json.dumps(config, indent=2) + "\n")


def _adapters(plan: Plan) -> list[Adapter]:
    found: list[Problem] = []
    adapters: list[Adapter] = []
    for model in plan.inputs.models:
        where = f"models[{model.position}].model"
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


def _merge_module(plan: Plan, adapters: Sequence[Adapter], job: Job) -> Pair:
    name = job.tensor.name
    with_it = [a for a in adapters if name in a.targets]
    module = with_it[0].targets[name]
    total = sum(a.rank(module) for a in with_it)
    limit = min(job.tensor.shape)
    wanted = plan.spec.output.rank
    rank = limit if wanted == "full" else min(limit, total if wanted is None else wanted)
    factors = plan.method.coefficients(job.params)
    if factors is not None and not any(a.parts[module].magnitude for a in with_it):
        pair = _concatenate(plan.inputs.models, factors, module)
        if pair.rank <= rank or wanted is None:
            return Pair(module, pair, 0.0)
        return Pair(module, *recompress(pair, rank))
    part = with_it[0].parts[module]
    transposed = part.embedding or bool(with_it[0].config.get("fan_in_fan_out"))
    return Pair(module, *factor(_dense(plan, job), rank, transposed))


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


def _dense(plan: Plan, job: Job) -> Floats:
    """Compute the merged delta of a whole matrix."""
    base = plan.inputs.base
    assert base is not None
    stream = Stream(job.tensor, plan.method, plan.inputs, Scratch(len(plan.inputs.models)))
    state = plan.method.prepare(stream, job.params) if plan.method.prepare else None
    delta = np.empty(job.tensor.count, np.float32)
    values = np.empty_like(stream.scratch.base)
    for start, merged in merged_chunks(stream, plan.method, job, state):
        stop = start + len(merged)
        base.read(job.tensor.name, start, stop, values[: len(merged)])
        np.subtract(merged, values[: len(merged)], out=delta[start:stop])
    return delta.reshape(job.tensor.shape)


def _truncate(u: Any, s: Any, vt: Any, rank: int, transposed: bool) -> tuple[LowRank, float]:
    norm = float(np.linalg.norm(s))
    error = float(np.linalg.norm(s[rank:])) / norm if norm else 0.0
    root = np.sqrt(s[:rank])
    rows = (u[:, :rank] * root).astype(np.float32)
    cols = (root[:, None] * vt[:rank]).astype(np.float32)
    return LowRank(rows, cols, 1.0, transposed=transposed), error


def _write_card(plan: Plan, out: Path, pairs: Sequence[Pair]) -> None:
    sources = [m.weights.source for m in plan.inputs.models]
    worst = max(pair.error for pair in pairs)
    write_card(
        out,
        f"{plan.method.name} merge of {len(sources)} LoRAs",
        f"Merged from {', '.join(f'`{s}`' for s in sources)}. Largest relative error of a module: {worst:.2g}.",
        tags=["merge", "lora", plan.method.name],
        base=[plan.inputs.donor.source],
        spec=plan.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
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
