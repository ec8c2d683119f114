"""Set a router's policy so that a wanted share of the requests, or a wanted cost, goes where it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import specs
from toolkit.checkpoints.writer import check_free
from toolkit.data.rows import read_rows, user_text
from toolkit.errors import Problem, SpecError
from toolkit.names import did_you_mean
from toolkit.routing.examples import Examples, read_outcomes
from toolkit.routing.policy import price_for
from toolkit.routing.router import Router, load_router
from toolkit.routing.scope import novelty
from toolkit.routing.spec import CalibrateSpec
from toolkit.tables import Cell, Report, Table


@dataclass(frozen=True)
class Calibration(Report):
    """What a calibrated router does on the prompts that it was calibrated by.

    Attributes:
        router: with the new policy.
    """

    router: Router | None = None


def calibrate_router(
    spec: specs.Source | CalibrateSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    overwrite: bool = False,
) -> Calibration:
    """Find the price of cost at which a router keeps to a budget, and save the router with it.

    Or, for a `scope`, the distance from the prompts of the fit beyond which that share of the prompts lies.

    A choice is the expert of the largest score less `price` times its cost. For a `share`, the expert costs 1 and the
    others nothing, so the price is the threshold by which its score must be ahead. The router's own folder is replaced
    where no other is named.

    Raises:
        SpecError: the spec is wrong, or the budget is below the cheapest expert.
        DataError: a row without a prompt or a score.
        OutputError: `out` exists.
    """
    loaded = specs.load(spec, CalibrateSpec, overrides=overrides, smoke=smoke)
    router = load_router(loaded.router, trust_remote_code=loaded.trust_remote_code)
    folder = out or loaded.out or (None if isinstance(loaded.router, Router) else loaded.router)
    own = folder is not None and folder == loaded.router
    if folder is not None:
        check_free(Path(folder), overwrite=overwrite or own)
    examples = read_outcomes(loaded.outcomes) if loaded.outcomes else None
    prompts = examples.prompts if examples else [user_text(row) for row in read_rows(loaded.prompts or [])]
    result = _scoped(loaded, router, prompts) if loaded.scope else _priced(loaded, router, prompts, examples)
    if folder is not None and result.router is not None:
        result.router.save(folder, overwrite=overwrite or own)
    return result


def _scoped(spec: CalibrateSpec, router: Router, prompts: Sequence[str]) -> Calibration:
    """Set how far a prompt may be from those of the fit."""
    if router.references is None:
        raise spec.error([Problem("scope", "the router keeps no prompts to compare with; fit it with `scope`")])
    distances = novelty(router.features(prompts), router.references)
    most = float(np.quantile(distances, 1 - float(spec.scope or 0)))
    changed = router.changed(policy=router.policy.model_copy(update={"max_novelty": most}))
    out = float((distances > most).mean())
    numbers = {"max_novelty": most, "out_of_scope": out, "prompts": len(prompts), "version": changed.version}
    rows: list[list[Cell]] = [["max_novelty", most], ["share out of scope", out]]
    return Calibration(numbers, [Table(("on the given prompts", ""), rows, digits=4)], changed)


def _priced(spec: CalibrateSpec, router: Router, prompts: Sequence[str], examples: Examples | None) -> Calibration:
    """Set the price of cost."""
    costs = _costs(spec, router, examples)
    scores = router.score(prompts)
    budget = next(iter(spec.share.values())) if spec.share else float(spec.cost or 0)
    column = np.array([costs.get(name, 0.0) for name in router.experts])
    try:
        price = price_for(scores, column, budget, exact=spec.share is not None)
    except SpecError as error:
        raise spec.error([Problem("cost", str(error))]) from None
    policy = router.policy.model_copy(update={"costs": costs, "price": price})
    return _report(router.changed(policy=policy), scores, column, examples)


def _costs(spec: CalibrateSpec, router: Router, examples: Examples | None) -> dict[str, float]:
    """Return the cost of each expert; for a share, 1 of that expert and 0 of the others."""
    given = spec.share or spec.costs
    unknown = [name for name in given if name not in router.experts]
    where = "share" if spec.share else "costs"
    if unknown:
        found = [Problem(f"{where}.{n}", f"not an expert{did_you_mean(n, router.experts)}") for n in unknown]
        raise spec.error(found)
    if examples is not None and set(examples.experts) != set(router.experts):
        names = ", ".join(examples.experts)
        raise spec.error([Problem("outcomes", f"of {names}; the router chooses among {', '.join(router.experts)}")])
    if spec.share:
        return dict.fromkeys(spec.share, 1.0)
    if not spec.costs and examples is None:
        raise spec.error([Problem("costs", "a cost per request needs the cost of every expert")])
    measured = {} if examples is None else dict(zip(examples.experts, map(float, examples.costs), strict=True))
    return measured | spec.costs


def _report(router: Router, scores: Any, costs: Any, examples: Examples | None) -> Calibration:
    chosen = (scores - router.policy.price * costs).argmax(axis=1)
    shares = np.bincount(chosen, minlength=len(router.experts)) / len(chosen)
    numbers: dict[str, Any] = {
        "price": router.policy.price,
        "cost": float(costs[chosen].mean()),
        "shares": dict(zip(router.experts, shares.tolist(), strict=True)),
        "prompts": len(chosen),
        "version": router.version,
    }
    if examples is not None:
        columns = [examples.experts.index(name) for name in router.experts]
        reached = examples.quality[:, columns][np.arange(len(chosen)), chosen]
        numbers["quality"] = float(np.nanmean(reached))
    rows: list[list[Cell]] = [[f"share of {name}", share] for name, share in numbers["shares"].items()]
    rows += [[name, numbers[name]] for name in ("cost", "quality", "price") if name in numbers]
    return Calibration(numbers, [Table(("on the given prompts", ""), rows, digits=4)], router)
