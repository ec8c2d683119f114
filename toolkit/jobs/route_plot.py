"""Draw what quality routers reach for their cost, with matplotlib, which is imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from toolkit.jobs.plots import COLORS
from toolkit.routing.curves import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", "-.", ":")


def draw_curves(curves: Mapping[str, Curve]) -> Figure:
    """Draw the quality by the share of strong calls, one line per way to choose."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for at, (name, drawn) in enumerate(curves.items()):
        color, dashes = COLORS[at % len(COLORS)], DASHES[at % len(DASHES)]
        label = f"{name} (APGR {drawn.apgr():.3f})"
        axes.plot(100 * drawn.share, drawn.quality, label=label, color=color, linestyle=dashes)
    axes.set_xlabel("requests to the strong expert, percent")
    axes.set_ylabel("mean quality")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
