"""Measure models and candidates on tasks, as `toolkit evaluate` does; the base is loaded once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from toolkit.errors import UnsupportedError
from toolkit.evaluation.spec import TaskSpec
from toolkit.jobs.evaluate import evaluate
from toolkit.jobs.search.setup import Setup, Source, parts, placed
from toolkit.merge.run import merge
from toolkit.models.load import LoadedModel, load_model, pick_device

Scores = dict[str, float]
"""What each task measured."""


class Judge:
    """Gives scores.

    Args:
        setup: of the search.
        folder: to put candidates in.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder = setup, folder
        self.trusted = setup.spec.trust_remote_code

    def model(self, source: Source, tasks: Mapping[str, TaskSpec]) -> Scores:
        """Measure the base, or an input of the merge."""
        if not isinstance(source, str):
            return self.merge(source, tasks)
        full, adapter = parts(source, self.setup.base)
        try:
            if isinstance(full, str):
                return self._measure(full, adapter, tasks)
        except UnsupportedError:
            if adapter is None:
                raise
        # On a base that is a merge, or such as one that stores modules whole, which no engine can run beside others.
        alone = {"model": adapter, "parameters": {"weight": 1}}
        return self.merge({"merge_method": "linear", "base_model": full, "models": [alone]}, tasks)

    def merge(self, spec: Mapping[str, Any], tasks: Mapping[str, TaskSpec]) -> Scores:
        """Measure a merge: exactly what it writes, which is removed again.

        Raises:
            UnsupportedError: what it gives are no numbers.
        """
        out = self.folder / "candidate"
        try:
            with placed(self.setup.spec):
                merge(spec, out, overwrite=True, quiet=True)
            base = self.setup.base
            if spec.get("output", {}).get("type") == "adapter" and isinstance(base, str):
                return self._measure(base, out, tasks)
            return self._measure(str(out), None, tasks)
        finally:
            shutil.rmtree(out, ignore_errors=True)

    @cached_property
    def _base(self) -> LoadedModel:
        device = pick_device(self.setup.spec.device)
        return load_model(self.setup.base, device=device, trust_remote_code=self.trusted)

    def _measure(self, full: str, adapter: str | Path | None, tasks: Mapping[str, TaskSpec]) -> Scores:
        spec: dict[str, Any] = {
            "base": self._base if full == self.setup.base else full,
            "tasks": dict(tasks),
            "rows": {"it": "adapter" if adapter else "base"},
            "device": self.setup.spec.device,
            "trust_remote_code": self.trusted,
        }
        if adapter:
            spec["adapters"] = {"adapter": adapter}
        scores = evaluate(spec, quiet=True).numbers["scores"]["it"]
        for task, score in scores.items():
            if not isfinite(score):
                raise UnsupportedError(f"the perplexity of {task} is {score}")
        return scores
