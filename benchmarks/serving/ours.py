"""The toolkit's engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.serving.work import REGISTERED, Case, Size
from toolkit.serving.engine import Engine
from toolkit.serving.request import Sampling
from toolkit.serving.spec import Limits

AT_ONCE = {"small": 64, "large": 16}
"""Requests that each engine runs at once."""


class Ours:
    """Two engines on one base, made when they are first asked; prompts are never found in a cache.

    Args:
        folder: see `work.write_all`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions = {name: version(name) for name in ("composition-toolkit", "torch", "transformers")}

    @cached_property
    def small(self) -> Engine:
        """It knows the adapters that are asked for at most at once."""
        return self._engine("small", 64, None)

    @cached_property
    def large(self) -> Engine:
        """It knows a thousand, and its pool holds some 20 of them beside the answers."""
        return self._engine("large", REGISTERED, 20)

    def _engine(self, name: str, adapters: int, resident: int | None) -> Engine:
        found = {f"a{i}": self.folder / "adapters" / f"a{i}" for i in range(adapters)}
        found = {name: path for name, path in found.items() if path.is_dir()}
        limits = Limits(max_requests=AT_ONCE[name], prefix_cache=False)
        engine = Engine(str(self.folder / "base"), found, limits=limits, device="cpu")
        if resident is None:
            return engine
        tokens = limits.page_size * (engine.adapters.infos["a0"].pages * resident + 8 * AT_ONCE[name])
        engine.close()
        return Engine(
            str(self.folder / "base"), found, limits=limits.model_copy(update={"cache_tokens": tokens}), device="cpu"
        )

    def close(self) -> None:
        """End the engines."""
        for name in ("small", "large"):
            if name in vars(self):
                vars(self)[name].close()

    def prepare(self, case: Case) -> Engine:
        """Return the engine of a case, made at its first use."""
        return self.small if case.engine == "small" else self.large

    def run(self, case: Case, size: Size) -> Sequence[Sequence[int]]:
        """Answer the requests of a case."""
        engine = self.prepare(case)
        sampling = Sampling(max_tokens=case.answer, ignore_eos=True)
        asked = zip(case.prompts(size), case.models, strict=True)
        tickets = [engine.submit(prompt, model or "base", sampling) for prompt, model in asked]
        while engine.step():
            pass
        return [ticket.request.output for ticket in tickets]

    def shares(self, case: Case, size: Size) -> dict[str, float]:
        """Return the part of the step's CPU time that goes to the scheduler, the model, the choice of tokens."""
        engine = self.prepare(case)
        clock = Clock()
        parts = {
            "scheduler": [(engine.scheduler, "schedule"), (engine.scheduler, "computed"), (engine.scheduler, "finish")],
            "model": [(engine.model, "forward")],
            "batch": [(engine.runner, "run")],
            "sampling": [(engine.sampler, "sample")],
            "step": [(engine, "step")],
        }
        for part, places in parts.items():
            for owner, name in places:
                clock.watch(part, owner, name)
        try:
            self.run(case, size)
        finally:
            clock.restore()
        spent = dict(clock.spent)
        step = spent.pop("step")
        spent["batch"] -= spent["model"]
        return {**{part: value / step for part, value in spent.items()}, "rest": 1 - sum(spent.values()) / step}


class Clock:
    """Adds up the CPU seconds of methods, by part."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._watched: list[tuple[Any, str]] = []

    def watch(self, part: str, owner: Any, name: str) -> None:
        """Count the calls of a method of an object towards a part."""
        method: Callable[..., Any] = getattr(owner, name)
        self.spent.setdefault(part, 0.0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.spent[part] += time.thread_time() - started

        setattr(owner, name, timed)
        self._watched.append((owner, name))

    def restore(self) -> None:
        """Take the watches off."""
        for owner, name in self._watched:
            delattr(owner, name)


def make(name: str, folder: Path) -> Ours:
    """Return the engine."""
    return Ours(folder)
