"""Build a mixture of experts: compute its routers, then write tensor after tensor into preallocated files."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import specs
from toolkit.checkpoints.companions import copy_companions, write_card
from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.dtypes import Floats, all_finite
from toolkit.checkpoints.writer import SHARD_BYTES, WeightsWriter, check_free, check_space, staged, write_text
from toolkit.merge.moe.gates import alike, make_gates
from toolkit.merge.moe.plan import Plan, make_plan
from toolkit.merge.moe.spec import MoeSpec
from toolkit.merge.record import file_identity, files_table
from toolkit.progress import track
from toolkit.tables import Report, Table

ALIKE = 0.92
"""Cosine of two experts' vectors above which the user is told; the condition number of the two is 5 there."""


@dataclass(frozen=True)
class Mixture(Report):
    """A finished mixture.

    Attributes:
        path: folder that was written.
        non_finite: output tensors that hold NaN or infinity.
    """

    path: Path = Path()
    non_finite: Sequence[str] = ()


def build_moe(
    spec: specs.Source | MoeSpec,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    allow_pickle: bool = False,
    quiet: bool = False,
) -> Mixture:
    """Make a mixture of experts out of dense models and write it.

    Attention, norms and embeddings are the base's, the experts' MLPs are put behind a router, whose vectors come from
    the hidden states of prompts. No model is held in memory but the base while it reads the prompts.

    Args:
        spec: a YAML file (mergekit-moe's runs unchanged), a dict or a `MoeSpec`.
        out: folder to write; it appears only when it is whole.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.
        overwrite: replace `out` if it exists.
        device: where the base reads the prompts.
        shard_bytes: largest size of an output file.
        allow_pickle: also read pickled checkpoints, with `weights_only`.
        quiet: show no progress.

    Raises:
        SpecError: everything that is wrong with the spec and the way its models fit, before any weight is read.
        OutputError: `out` exists, or cannot be written.
    """
    started, out = time.perf_counter(), Path(out)
    loaded = specs.load(spec, MoeSpec, overrides=overrides, smoke=smoke)
    check_free(out, overwrite=overwrite)
    plan = make_plan(loaded, allow_pickle=allow_pickle, shard_bytes=shard_bytes)
    try:
        check_space(out, plan.write_bytes)
        gates = make_gates(plan, device=device, quiet=quiet)
        with staged(out, overwrite=overwrite) as partial:
            bad = _write(plan, gates, partial, quiet)
            _write_companions(plan, partial)
    finally:
        plan.models.close()
    return _result(plan, gates, out, bad, time.perf_counter() - started)


def _write(plan: Plan, gates: Floats, folder: Path, quiet: bool) -> list[str]:
    """Write all weights; return the tensors that are not finite."""
    bad: list[str] = []
    writer = WeightsWriter(folder, plan.shards)
    try:
        with track("building", plan.write_bytes, unit="B", quiet=quiet) as progress:
            for part in plan.parts:
                finite = True
                for start, stop in chunks(part.tensor.shape):
                    raw = part.read(start, stop, gates)
                    finite &= all_finite(raw, part.tensor.dtype)
                    writer.write(part.tensor.name, start, raw)
                bad += [] if finite else [part.tensor.name]
                progress.advance(part.tensor.nbytes)
        writer.flush()
        writer.write_index()
    finally:
        writer.close()
    return bad


def _write_companions(plan: Plan, folder: Path) -> None:
    write_text(folder / "config.json", json.dumps(plan.config, indent=2) + "\n")
    base = plan.models.base
    if base.folder:
        copy_companions(base.folder, folder)
    sources = list(dict.fromkeys(expert.source for expert in plan.models.experts.values()))
    files = set().union(*(model.files() for model in (base, *plan.models.experts.values())))
    hashes = files_table([file_identity(file, "sample") for file in sorted(files)])
    write_card(
        folder,
        f"{plan.architecture.name} of {len(plan.spec.experts)} experts",
        f"Experts from {', '.join(f'`{source}`' for source in sources)}; all else from `{base.source}`.",
        tags=["merge", "moe"],
        base=list(dict.fromkeys([base.source, *sources])),
        spec=plan.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        details="\n\n".join(table.to_markdown() for table in (plan.table(), hashes)),
    )


def _result(plan: Plan, gates: Floats, out: Path, bad: list[str], seconds: float) -> Mixture:
    numbers = {"path": str(out), **plan.numbers(), "seconds": round(seconds, 3), "non_finite": bad}
    table = plan.table(str(out))
    rows = [*table.rows, ["seconds", f"{seconds:.2f}"]]
    if len(plan.spec.experts) > 1:
        cosine, layer = alike(gates[:, : len(plan.spec.experts)])
        numbers |= {"gate_cosine": cosine, "gate_cosine_layer": layer}
        told = ": prompts too similar, one of the two experts will get few tokens" if cosine > ALIKE else ""
        rows.append(["most similar routers", f"cosine {cosine:.3f} in layer {layer}{told}"])
    if bad:
        rows.append(["NaN or infinity in", ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")])
    return Mixture(numbers, [Table(table.columns, rows)], out, bad)
