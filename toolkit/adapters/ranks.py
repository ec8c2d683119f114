"""Change the ranks of a LoRA folder: the best pairs of another rank, or those that all modules together can best spare.

By the theorem of Eckart, Young and Mirsky the best change of a rank keeps the largest singular values; `B A` has at
most `r` of them, found from the QR decompositions of both factors without the product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from math import floor, hypot, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.adapters import CONFIG, WEIGHTS, Adapter, LowRank, open_adapter
from toolkit.checkpoints.writer import check_free, staged
from toolkit.errors import SpecError, UnsupportedError
from toolkit.merge.svd import rank_for_energy
from toolkit.tables import Report, Table, human_bytes

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Factored:
    """A pair as a singular value decomposition: `u @ diag(s) @ vt`.

    Attributes:
        u: `[M, r]` float64.
        s: `[r]`, the largest first.
        vt: `[r, N]`.
        transposed: as of the pair.
    """

    u: Values
    s: Values
    vt: Values
    transposed: bool

    def truncated(self, rank: int) -> LowRank:
        """Return the best pair of a rank, both factors of one size; zeros where there is nothing more to keep."""
        root = np.sqrt(self.s[:rank])
        missing = max(rank - len(self.s), 0)
        rows = np.pad(self.u[:, :rank] * root, ((0, 0), (0, missing)))
        cols = np.pad(root[:, None] * self.vt[:rank], ((0, missing), (0, 0)))
        return LowRank(rows.astype(np.float32), cols.astype(np.float32), 1.0, transposed=self.transposed)


def factored(pair: LowRank) -> Factored:
    """Decompose a pair."""
    q_rows, r_rows = np.linalg.qr(pair.rows.astype(np.float64))
    q_cols, r_cols = np.linalg.qr(pair.cols.T.astype(np.float64))
    u, s, vt = np.linalg.svd(pair.scale * (r_rows @ r_cols.T))
    rank = min(pair.rank, len(s))
    return Factored(q_rows @ u[:, :rank], s[:rank], vt[:rank] @ q_cols.T, pair.transposed)


def resize(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
) -> Report:
    """Write a LoRA with other ranks, each pair the best of its rank.

    Args:
        adapter: a folder or a hub id.
        out: folder to write.
        rank: of every pair; a larger one than it has is exact, and padded with zeros.
        energy: instead, the share of each change's squared Frobenius norm that is kept.
        overwrite: replace `out` if it exists.

    Raises:
        SpecError: not one of rank and energy, or a value that means nothing.
        MissingError, CheckpointError, UnsupportedError: no LoRA, or one that is more than pairs.
        OutputError: `out` exists.
    """
    if (rank is None) == (energy is None):
        raise SpecError("give one of rank and energy")
    if rank is not None and rank < 1:
        raise SpecError(f"rank: expected at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise SpecError(f"energy: expected a share above 0 and up to 1, got {energy}")
    check_free(Path(out), overwrite=overwrite)

    def choose(found: Mapping[str, Factored]) -> dict[str, int]:
        if rank is not None:
            return dict.fromkeys(found, rank)
        return {name: max(rank_for_energy(one.s, energy or 1), 1) for name, one in found.items()}

    return _rewrite("resize", adapter, Path(out), choose, overwrite)


def prune(adapter: str | Path, out: str | Path, *, share: float, overwrite: bool = False) -> Report:
    """Write a LoRA without the ranks that matter least, over all modules together; modules may lose all.

    Args:
        adapter: a folder or a hub id.
        out: folder to write.
        share: of all ranks to remove, `floor(share * ranks)`: those of the smallest singular values.
        overwrite: replace `out` if it exists.

    Raises:
        As `resize`.
    """
    if not 0 < share < 1:
        raise SpecError(f"share: expected a share between 0 and 1, got {share}")
    check_free(Path(out), overwrite=overwrite)

    def choose(found: Mapping[str, Factored]) -> dict[str, int]:
        values = sorted((s, name) for name, one in found.items() for s in one.s.tolist())
        removed = Counter(name for _, name in values[: floor(share * len(values))])
        return {name: len(one.s) - removed[name] for name, one in found.items()}

    return _rewrite("prune", adapter, Path(out), choose, overwrite)


def _rewrite(
    title: str,
    source: str | Path,
    out: Path,
    choose: Callable[[Mapping[str, Factored]], Mapping[str, int]],
    overwrite: bool,
) -> Report:
    with closing(open_adapter(source)) as adapter:
        if adapter.is_dora:
            raise UnsupportedError(f"{source}: DoRA's magnitudes belong to the whole change; convert it to LoRA first")
        found = {module: factored(adapter.low_rank(module)) for module in adapter.parts}
        ranks = {module: rank for module, rank in choose(found).items() if rank}
        pairs = {module: found[module].truncated(rank) for module, rank in ranks.items()}
        with staged(out, overwrite=overwrite) as partial:
            _write(adapter, partial, pairs)
        lost = {module: _lost(one, ranks.get(module, 0)) for module, one in found.items()}
        before = {module: adapter.rank(module) for module in adapter.parts}
    return _report(title, out, before, ranks, lost)


def _lost(one: Factored, rank: int) -> float:
    """Return the relative error in the Frobenius norm."""
    whole = float(np.linalg.norm(one.s))
    return float(np.linalg.norm(one.s[rank:])) / whole if whole else 0.0


def _write(adapter: Adapter, folder: Path, pairs: Mapping[str, LowRank]) -> None:
    """Write a copy of an adapter with other pairs; what it stores whole stays as it is."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter.folder / WEIGHTS)
    for module, part in adapter.parts.items():
        a, b = tensors.pop(part.a), tensors.pop(part.b)
        if module in pairs:
            low = pairs[module]
            rows, cols = (low.rows.T, low.cols.T) if low.transposed else (low.cols, low.rows)
            tensors[part.a] = torch.from_numpy(np.ascontiguousarray(rows)).to(a.dtype)
            tensors[part.b] = torch.from_numpy(np.ascontiguousarray(cols)).to(b.dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_config(adapter.config, {name: pair.rank for name, pair in pairs.items()}, folder)


def _write_config(config: Mapping[str, Any], ranks: Mapping[str, int], folder: Path) -> None:
    """Write the configuration of pairs whose scale is 1 everywhere."""
    import json

    from toolkit.checkpoints.writer import write_text

    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {module: rank for module, rank in ranks.items() if rank != usual}
    changed = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    write_text(folder / CONFIG, json.dumps({**config, **changed}, indent=2) + "\n")


def _report(
    title: str, out: Path, before: Mapping[str, int], after: Mapping[str, int], lost: Mapping[str, float]
) -> Report:
    size = (out / WEIGHTS).stat().st_size
    numbers = {
        "path": str(out),
        "modules": len(after),
        "ranks_before": sum(before.values()),
        "ranks": sum(after.values()),
        "bytes": size,
        "relative_error": dict(lost),
    }
    rows = [
        ["modules", f"{len(before)} -> {len(after)}"],
        ["ranks in all", f"{sum(before.values())} -> {sum(after.values())}"],
        ["largest relative error of a module", f"{max(lost.values(), default=0.0):.2g}"],
        ["root mean square of these", f"{_mean(lost):.2g}"],
        ["written", human_bytes(size)],
    ]
    return Report(numbers, [Table((title, str(out)), rows)])


def _mean(lost: Mapping[str, float]) -> float:
    return hypot(*lost.values()) / sqrt(len(lost)) if lost else 0.0
