"""Search the coefficients without gradients, by CMA-ES; each candidate is one forward pass over the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cmaes import CMA

from toolkit.checkpoints.writer import write_text
from toolkit.merge.learning.blocks import Values
from toolkit.merge.learning.session import Session
from toolkit.progress import track

STATE = "search.json"


def evolve(
    session: Session,
    measure: Callable[[Values], float],
    *,
    start: float,
    low: float,
    high: float,
    sigma: float,
    budget: int,
    seed: int,
) -> tuple[Values, list[float]]:
    """Minimise a function of the coefficients.

    What was measured before a kill is taken from the session's folder: the same seed proposes the same candidates.

    Args:
        session: whose models and blocks are taken.
        measure: of coefficients `[M, G]`.
        start: of every coefficient; the first candidate is the start itself.
        low: smallest value; a candidate beyond it is measured at it.
        high: largest value, likewise.
        sigma: first standard deviation.
        budget: candidates.
        seed: of the candidates.

    Returns:
        The best coefficients `[M, G]`, and what was measured of all candidates in order.
    """
    shape = (session.models, len(session.blocks.groups))
    mean = np.full(shape[0] * shape[1], start)
    optimizer = CMA(mean, sigma, bounds=np.tile([low, high], (len(mean), 1)), seed=seed)
    known = _known(session.folder / STATE, session.fingerprint)
    found: list[float] = []
    best, lowest = mean, np.inf
    with track("searching", budget, unit="candidates", quiet=session.quiet) as progress:
        while len(found) < budget:
            asked = [optimizer.ask() for _ in range(optimizer.population_size)]
            candidates = asked if found else [mean, *asked[1:]]
            told: list[tuple[np.ndarray, float]] = []
            for candidate in candidates[: budget - len(found)]:
                number = len(found)
                value = known[number] if number < len(known) else measure(candidate.reshape(shape))
                found.append(value)
                if number >= len(known):
                    _note(session.folder / STATE, session.fingerprint, found)
                if value < lowest:
                    best, lowest = candidate, value
                told.append((candidate, value))
                progress.note(f"lowest {lowest:.4f}")
                progress.advance()
            if len(told) == optimizer.population_size:
                optimizer.tell(told)
    (session.folder / STATE).unlink(missing_ok=True)
    return best.reshape(shape), found


def _known(file: Path, fingerprint: str) -> list[float]:
    if not file.is_file():
        return []
    held = json.loads(file.read_text(encoding="utf-8"))
    return held["losses"] if held["fingerprint"] == fingerprint else []


def _note(file: Path, fingerprint: str, losses: list[float]) -> None:
    write_text(file, json.dumps({"fingerprint": fingerprint, "losses": losses}))
