"""How candidates are proposed: CMA-ES, a grid, or at random; and the loop that measures what is proposed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import floor, log, prod

from toolkit.errors import Problem
from toolkit.evaluation.spec import TaskSpec
from toolkit.jobs.search.space import Space, Values
from toolkit.jobs.search.spec import OptionsSpec

Proposals = Generator[Values, float, None]
"""Yields candidates; each is answered with its score, of which larger is better."""

BUDGET = 50


@dataclass(frozen=True)
class Evaluation:
    """One candidate that was measured.

    Attributes:
        values: of the free numbers.
        score: what the search raises; 0 where it could not be measured.
        scores: by task.
        error: why it could not be measured.
    """

    values: Values
    score: float
    scores: Mapping[str, float]
    error: str = ""


def budget_of(options: OptionsSpec, space: Space) -> tuple[int, list[Problem]]:
    """Return how many candidates are measured at most, and whether that is too few."""
    if options.method == "grid":
        points = prod(free.bounds.points for free in space.free)
        needed, what = points + 1, f"the merge as given and the grid's {points:,} points"
    elif options.method == "cma":
        population = population_of(options, space)
        needed, what = population + 1, f"the merge as given and one population of {population}"
    else:
        needed, what = 2, "the merge as given and one more"
    budget = options.budget or (needed if options.method == "grid" else max(BUDGET, needed))
    wrong = [Problem("search.budget", f"{budget} is too few: {what} make {needed:,}")] if budget < needed else []
    return budget, wrong


def population_of(options: OptionsSpec, space: Space) -> int:
    """Return the candidates of a generation of CMA-ES."""
    return options.population or 4 + floor(3 * log(max(1, len(space.free))))


def propose(options: OptionsSpec, space: Space) -> Proposals:
    """Return the candidates of a search, the merge as given apart; the same seed and scores give the same ones."""
    return {"cma": _cma, "grid": _grid, "random": _random}[options.method](options, space)


def _cma(options: OptionsSpec, space: Space) -> Proposals:
    """CMA-ES between the bounds: Hansen, "The CMA Evolution Strategy: A Tutorial", 2016 (arXiv:1604.00772).

    A candidate beyond a bound is measured at the bound, and the further beyond the worse it is taken for, in units of
    the spread of its generation; drawing it again, as is usual, keeps the search from optima at a bound.
    """
    import numpy as np
    from cmaes import CMA

    mean = np.array([free.position(free.start) for free in space.free])
    size = population_of(options, space)
    optimizer = CMA(mean, options.sigma, seed=options.seed, population_size=size)
    while not optimizer.should_stop():
        drawn = [optimizer.ask() for _ in range(size)]
        within = [np.clip(positions, 0, 1) for positions in drawn]
        losses: list[float] = []
        for positions in within:
            score = yield space.values(positions.tolist())
            losses.append(-score)
        spread = np.quantile(losses, 0.75) - np.quantile(losses, 0.25)
        beyond = [float(np.sum((x - y) ** 2)) for x, y in zip(drawn, within, strict=True)]
        told = [loss + float(spread) * far for loss, far in zip(losses, beyond, strict=True)]
        optimizer.tell(list(zip(drawn, told, strict=True)))


def _grid(options: OptionsSpec, space: Space) -> Proposals:
    axes = [[free.value(i / (free.bounds.points - 1)) for i in range(free.bounds.points)] for free in space.free]
    for point in product(*axes):  # noqa: UP028 - a product takes no scores
        yield point


def _random(options: OptionsSpec, space: Space) -> Proposals:
    import numpy as np

    generator = np.random.default_rng(options.seed)
    while True:
        yield space.values(generator.random(len(space.free)).tolist())


def run(start: Values, proposals: Proposals, budget: int, measure: Callable[[Values], Evaluation]) -> list[Evaluation]:
    """Measure the start and what is proposed after it, as far as the budget goes; values that come back are known."""
    known: dict[Values, Evaluation] = {}
    done: list[Evaluation] = []
    candidate = start
    while True:
        if candidate not in known:
            known[candidate] = measure(candidate)
        done.append(known[candidate])
        if len(done) == budget:
            return done
        try:
            candidate = next(proposals) if len(done) == 1 else proposals.send(done[-1].score)
        except StopIteration:
            return done


def best_of(done: Sequence[Evaluation]) -> Evaluation:
    """Return the evaluation with the largest score, the first of several."""
    return max(done, key=lambda evaluation: evaluation.score)


def score_of(scores: Mapping[str, float], tasks: Mapping[str, TaskSpec]) -> float:
    """Return the mean over tasks, in percent: right answers, and `100 / perplexity`.

    The latter is the probability that a model gives to a right token, their geometric mean over the tokens.
    """
    shares = [s if tasks[name].metric == "exact_match" else 100 / s for name, s in scores.items()]
    return sum(shares) / len(shares)
