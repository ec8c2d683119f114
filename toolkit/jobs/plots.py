"""Draw compared deltas with matplotlib, which is imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toolkit.errors import OutputError, UnsupportedError
from toolkit.jobs.conflicts import short_names
from toolkit.merge.conflicts import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Of lines: the palette of Okabe and Ito, which colour-blind readers can tell apart, without its yellow."""

MARKERS = "os^Dv<>"
LABELS = 24
"""Layers that are named below an axis."""

WRITTEN = 12
"""Models up to which every cosine is written into its cell."""


def check_matplotlib() -> None:
    """Raise an `UnsupportedError` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401  # only whether it is there
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"plots need {error.name}: pip install 'composition-toolkit[plot]'") from None


def check_plot(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a picture that could not be written, before anything is measured.

    Raises:
        UnsupportedError: matplotlib is not installed, or the name has another ending than `FORMATS`.
        OutputError: the file exists, or its folder does not.
    """
    check_matplotlib()
    if path.suffix.lower() not in FORMATS:
        raise UnsupportedError(f"{path}: a plot is one of {', '.join(FORMATS)}; name the file so")
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path}: {'is a folder' if path.is_dir() else f'there is no folder {path.parent}'}")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; name another file, or pass --overwrite")


def save_plot(comparison: Comparison, path: Path) -> None:
    """Draw a comparison into a file; see `save_figure`."""
    save_figure(draw(comparison), path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure into a file; it appears only when it is whole.

    Raises:
        OutputError: it cannot be written.
    """
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix.lower()[1:], dpi=150)
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_bytes(drawn.getvalue())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"{path}: {error.strerror}") from None


def draw(comparison: Comparison) -> Figure:
    """Draw norms, sign conflicts and energy per layer, and the cosines between models.

    One model has no cosines or conflicts, and energy is drawn where it was measured.
    """
    from matplotlib.figure import Figure

    panels = [_draw_norms]
    panels += [_draw_cosines, _draw_conflicts] if len(comparison.models) > 1 else []
    panels += [_draw_energy] if comparison.ranks else []
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    width = 5 + 0.1 * min(len(comparison.layers), 40)
    figure = Figure(figsize=(width * columns, 4.4 * rows), layout="constrained")
    figure.suptitle(f"Deltas from {short_names([comparison.base])[0]}")
    for index, panel in enumerate(panels):
        panel(figure.add_subplot(rows, columns, index + 1), comparison)
    return figure


def _draw_norms(axes: Axes, comparison: Comparison) -> None:
    norms = np.array([sums.relative_norms for sums in comparison.layers.values()])
    axes.set_title("Norm of each delta")
    _draw_lines(axes, comparison, norms, short_names(comparison.models))
    axes.set_ylabel("norm / norm of the base")
    axes.set_ylim(bottom=0)


def _draw_conflicts(axes: Axes, comparison: Comparison) -> None:
    pairs = list(combinations(range(len(comparison.models)), 2))
    layers = list(comparison.layers.values())
    of_pairs = np.array([[sums.conflicts[p] if sums.both[p] else np.nan for p in pairs] for sums in layers])
    axes.set_title("Sign conflicts (line: all models; shaded: the pairs)")
    _draw_band(axes, of_pairs, COLORS[0])
    _draw_lines(axes, comparison, np.array([[sums.clashes] for sums in layers]), ["all models"])
    axes.set_ylabel("share of what several change")
    axes.set_ylim(-0.02, 1.02)


def _draw_energy(axes: Axes, comparison: Comparison) -> None:
    layers = list(comparison.layers.values())
    several = len(comparison.models) > 1
    axes.set_title("Energy in the top ranks" + (" (line: mean; shaded: the models)" if several else ""))
    for at in range(len(comparison.ranks)):
        _draw_band(axes, np.array([sums.energy[:, at] for sums in layers]), COLORS[at % len(COLORS)])
    means = np.array([sums.mean_energy() for sums in layers])
    _draw_lines(axes, comparison, means, [f"top {rank}" for rank in comparison.ranks])
    axes.set_ylabel("share of the squared singular values")
    axes.set_ylim(-0.02, 1.02)


def _draw_lines(axes: Axes, comparison: Comparison, values: np.ndarray, labels: Sequence[str]) -> None:
    """Draw one line over the layers per column of `values` `[L, K]`; NaN is a gap."""
    for at, label in enumerate(labels):
        color, marker = COLORS[at % len(COLORS)], MARKERS[(at + at // len(COLORS)) % len(MARKERS)]
        axes.plot(np.arange(len(values)), values[:, at], label=label, color=color, marker=marker, markersize=4)
    parts = _short_parts(list(comparison.layers))
    every = -(-len(parts) // LABELS)
    axes.set_xticks(range(0, len(parts), every), parts[::every], rotation=90)
    axes.set_xlabel("layer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=1 + len(labels) // 8)


def _draw_band(axes: Axes, values: np.ndarray, color: str) -> None:
    """Shade from the least to the largest of each row of `[L, K]`, where there are several."""
    known = np.isfinite(values).any(axis=1)
    if values.shape[1] < 2 or not known.any():
        return
    low, high = np.full(len(values), np.nan), np.full(len(values), np.nan)
    low[known], high[known] = np.nanmin(values[known], axis=1), np.nanmax(values[known], axis=1)
    axes.fill_between(np.arange(len(values)), low, high, alpha=0.2, linewidth=0, color=color)


def _draw_cosines(axes: Axes, comparison: Comparison) -> None:
    names, cosines = short_names(comparison.models), comparison.total.cosines
    # Purple and orange are told apart by all; white is 0.
    image = axes.imshow(cosines, cmap="PuOr_r", vmin=-1, vmax=1)
    axes.set_title("Cosine between deltas")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    if len(names) <= WRITTEN:
        for (i, j), value in np.ndenumerate(cosines):
            color = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", color=color)
    assert axes.figure
    axes.figure.colorbar(image, ax=axes)


def _short_parts(parts: Sequence[str]) -> list[str]:
    """Leave out the name of the stack where all layers are of one."""
    stacks = {part.rpartition(".")[0] for part in parts if "." in part}
    return [part.rpartition(".")[2] for part in parts] if len(stacks) == 1 else list(parts)
