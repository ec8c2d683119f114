"""The course of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "loss.png"
_COLORS = {"loss": "#0072B2", "eval_loss": "#D55E00"}
"""Two that colour-blind readers can tell apart, of the palette of Okabe and Ito."""


def save_loss_plot(metrics: Path, path: Path) -> None:
    """Draw the losses that a run logged into a file.

    Args:
        metrics: JSONL file with an entry per line.
        path: of the picture; its ending is the format.
    """
    draw([json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]).savefig(path, dpi=150)


def draw(entries: list[dict[str, float]]) -> Figure:
    """Draw training and validation loss over the steps; a line of its own for each that was logged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, color in _COLORS.items():
        points = [(e["step"], e[key]) for e in entries if key in e]
        if points:
            label = "validation" if key == "eval_loss" else "training"
            axes.plot(*zip(*points, strict=True), color=color, label=label, marker="o" if key == "eval_loss" else "")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
