"""The whole story in one call: the recipe `quickstart.yaml` beside this file, and what to do next."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from toolkit import specs
from toolkit.checkpoints.locate import EMBEDDED
from toolkit.checkpoints.writer import resolved, write_text
from toolkit.errors import OutputError
from toolkit.jobs.recipe import RECORDS, RecipeSpec, run_recipe
from toolkit.tables import Report, Table

RECIPE = Path(__file__).with_suffix(".yaml")

NEXT = """Try next:
  toolkit serve {out}/serve.yaml
  toolkit route explain {out}/router 'Could you spell "banana" backwards?'
  toolkit run {out}/recipe.yaml --set steps.task_arithmetic-2.merge.parameters.weight=0.5"""


@dataclass(frozen=True)
class QuickstartResult(Report):
    """What the quickstart measured.

    Attributes:
        path: folder with the data, the adapters, the merges, the router and the scores.
    """

    path: Path = Path()


def quickstart(out: str | Path = "quickstart", *, smoke: bool = False, quiet: bool = False) -> QuickstartResult:
    """Train the skills' adapters on the embedded base, merge them, fit a router, serve and score all of it.

    Args:
        out: folder to work in; what is there already and still valid is not done again.
        smoke: a run of a few steps, which shows that everything works and scores nothing.
        quiet: show no progress.

    Raises:
        OutputError: a file or folder there is not of an earlier quickstart.
    """
    folder = resolved(Path(out))
    for name in ("serve.yaml", "recipe.yaml"):
        if (folder / name).exists() and not (folder / RECORDS).is_dir():
            raise OutputError(f"{folder / name}: exists already and is not the quickstart's; name another folder")
    result = run_recipe(RECIPE, folder, smoke=smoke, quiet=quiet)
    recipe = specs.load(RECIPE, RecipeSpec)
    experts = recipe.steps["router"]["route"]["experts"]
    served = {
        "model": EMBEDDED,
        "adapters": {name: str(folder / name) for name in experts},
        "router": str(folder / "router"),
    }
    write_text(folder / "serve.yaml", yaml.safe_dump(served, sort_keys=False))
    write_text(
        folder / "recipe.yaml",
        f"out: {json.dumps(str(folder), ensure_ascii=False)}\n\n{RECIPE.read_text(encoding='utf-8')}",
    )
    scores = result.results["scores"]["scores"]
    tasks = list(scores["base"])
    rows = [[label, *row.values(), sum(row.values()) / len(row)] for label, row in scores.items()]
    table = Table(("model", *tasks, "mean"), rows, "exact match, percent", digits=0)
    numbers = {"path": str(folder), "scores": scores, "seconds": result.numbers["seconds"]}
    return QuickstartResult(numbers, [table], folder)
