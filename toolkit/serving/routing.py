"""The router that an engine asks for the model `auto`, and the books of what it decided."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from toolkit.routing.drift import Meter
from toolkit.routing.router import Choice, Router

PROBE = "hello"
"""Prompt that a router has to decide on before it is used."""


class Routing:
    """One router at a time; what is counted goes on when another takes its place.

    Attributes:
        router: none, or the one that decides.
        version: of it; every choice carries the version of the router that made it.
        source: its folder, or none if it is in memory alone.
        since: when it came, in seconds since 1970.
        decisions: number by expert and reason.
        meter: drift of its scores.
        num_reloads: routers that took the place of another.
        num_refused: routers that were not fit to.
        refusal: why the last of them was not; empty once a later one is in use.
    """

    def __init__(self) -> None:
        self.router: Router | None = None
        self.version, self.source, self.since = "", None, 0.0
        self.decisions: Counter[tuple[str, str]] = Counter()
        self.meter = Meter({})
        self.num_reloads = self.num_refused = 0
        self.refusal = ""

    def use(self, router: Router, source: str | None = None) -> None:
        """Let a router decide from now on, if it can.

        Raises:
            CheckpointError: it does not fit its features.
        """
        router.choose([PROBE])
        self.num_reloads += self.router is not None
        self.router, self.version, self.source, self.since = router, router.version, source, time.time()
        self.meter, self.refusal = Meter(router.histograms), ""

    def refuse(self, reason: str) -> None:
        """Note why another router is not used."""
        self.num_refused += 1
        self.refusal = reason

    def choose(self, prompts: Sequence[str]) -> list[Choice]:
        """Let the router choose for each prompt, and count it."""
        assert self.router is not None
        choices = [replace(choice, version=self.version) for choice in self.router.choose(prompts)]
        self.decisions.update((choice.expert, choice.reason) for choice in choices)
        if self.meter.state:
            self.meter.observe(np.array([list(choice.scores.values()) for choice in choices], np.float32))
        return choices
