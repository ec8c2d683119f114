"""Go downhill on the coefficients, step by step, from where a kill left it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.errors import OutputError
from toolkit.merge.learning.blocks import Values
from toolkit.merge.learning.coefficients import Coefficients
from toolkit.merge.learning.objective import forget, teach
from toolkit.merge.learning.session import Outcome, Session
from toolkit.merge.learning.spec import DescentParams
from toolkit.progress import track
from toolkit.tables import Table

STATE = "state.pt"

Penalty = Callable[[Coefficients], torch.Tensor]
"""Of the coefficients alone; added to the loss."""


@dataclass
class _State:
    """What a killed run goes on from."""

    coefficients: Coefficients
    optimizer: torch.optim.Optimizer
    losses: list[float]
    chosen: Values | None = None

    def save(self, file: Path, fingerprint: str) -> None:
        held = {
            "fingerprint": fingerprint,
            "parameters": [p.detach() for p in self.coefficients.parameters],
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "chosen": None if self.chosen is None else torch.from_numpy(self.chosen),
        }
        beside = file.with_suffix(".partial")
        try:
            torch.save(held, beside)
            os.replace(beside, file)
        except OSError as error:
            raise OutputError(f"{file}: {error.strerror}") from None

    def load(self, file: Path, fingerprint: str) -> None:
        if not file.is_file():
            return
        held: dict[str, Any] = torch.load(file, weights_only=True)
        if held["fingerprint"] != fingerprint:
            return
        with torch.no_grad():
            for parameter, value in zip(self.coefficients.parameters, held["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(held["optimizer"])
        self.losses = held["losses"]
        self.chosen = None if held["chosen"] is None else held["chosen"].numpy()


def descend(
    session: Session, *, scale: float | None = None, penalty: Penalty | None = None, informative: float = 1.0
) -> Outcome:
    """Learn the coefficients of a session by its method's loss.

    Args:
        session: whose params are `DescentParams`.
        scale: start of a trained factor of all coefficients; by default there is none.
        penalty: of the coefficients, added to the loss.
        informative: share of the groups that are learned, those with the largest gradient at the start; the others
            stay where they start.
    """
    params = session.params
    assert isinstance(params, DescentParams)
    coefficients = Coefficients(session.models, len(session.blocks.groups), params, scale)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[params.optimizer]
    state = _State(coefficients, kind(coefficients.parameters, lr=params.learning_rate), [])
    state.load(session.folder / STATE, session.fingerprint)
    if params.loss == "distillation":
        teach(session)
    with track("learning", params.steps, unit="steps", quiet=session.quiet) as progress:
        progress.advance(len(state.losses))
        while len(state.losses) < params.steps:
            _step(session, state, penalty, informative)
            state.save(session.folder / STATE, session.fingerprint)
            progress.note(f"loss {state.losses[-1]:.4f}")
            progress.advance()
    if params.loss == "distillation":
        forget(session)
    (session.folder / STATE).unlink(missing_ok=True)
    return _outcome(state, params)


def _step(session: Session, state: _State, penalty: Penalty | None, informative: float) -> None:
    params, coefficients = session.params, state.coefficients
    assert isinstance(params, DescentParams)
    number = len(state.losses)
    rows = {task.name: task.batch(number, params.batch_size, params.seed) for task in session.tasks}
    loss, gradient = session.engine.gradient(coefficients.values(), session.losses(rows))
    if informative < 1:
        state.chosen = most_informative(gradient, informative) if state.chosen is None else state.chosen
        gradient *= state.chosen
    state.optimizer.zero_grad()
    coefficients.backward(gradient)
    if penalty is not None:
        added = penalty(coefficients)
        added.backward()
        loss += float(added.detach())
    state.optimizer.step()
    coefficients.project()
    state.losses.append(loss)


def most_informative(gradient: Values, share: float) -> Values:
    """Return 1 for the groups of `[M, G]` whose gradients are largest, 0 for the others; at least one is 1.

    A group's gradients are measured by their norm over the models.
    """
    norms = np.linalg.norm(gradient, axis=0)
    count = max(1, round(share * len(norms)))
    kept = np.zeros_like(gradient)
    kept[:, np.argsort(-norms, kind="stable")[:count]] = 1
    return kept


def _outcome(state: _State, params: DescentParams) -> Outcome:
    numbers: dict[str, Any] = {"steps": len(state.losses), "losses": state.losses}
    if state.coefficients.scale is not None:
        numbers["scale"] = float(state.coefficients.scale.detach())
    if state.chosen is not None:
        numbers["learned_groups"] = int(state.chosen[0].sum())
    tables = []
    if state.losses:
        rows = [["loss of the first step", state.losses[0]], ["loss of the last step", state.losses[-1]]]
        tables.append(Table((params.loss, "summed over tasks"), rows, digits=4))
    seen = {
        "entropy": "texts, without labels",
        "cross_entropy": "texts and labels",
        "contrastive": "pairs of texts",
        "distillation": "texts, and what each task's model predicts of them",
    }
    return Outcome(state.coefficients.values(), numbers, tables, seen[params.loss])
