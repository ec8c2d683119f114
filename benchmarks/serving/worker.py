"""One engine in a process of its own: loads, then runs each case that a line of standard input names.

`python -m benchmarks.serving.worker ENGINE FOLDER SIZE`; answers are lines of JSON. A peer may run it with the Python
of another environment, so what is imported here is the standard library and the engine alone.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.serving.work import CASES, SIZES, Case, Size

MODULES = {"toolkit": "ours", "transformers": "hf", "continuous": "hf", "PEFT": "hf", "vLLM": "vllm_cpu"}
"""Where each engine is."""


class EngineUnderTest(Protocol):
    """What an engine must do to be measured."""

    versions: dict[str, str]

    def prepare(self, case: Case) -> None:
        """Load what a case needs; not measured."""
        ...

    def run(self, case: Case, size: Size) -> Sequence[Sequence[int]]:
        """Answer the requests of a case once; return the tokens of each answer."""
        ...

    def shares(self, case: Case, size: Size) -> dict[str, float]:
        """Return what part of the CPU time goes where; empty where that is not known."""
        ...


def measured(engine: EngineUnderTest, case: Case, size: Size) -> dict[str, Any]:
    """Run a case; return its cost and its answers."""
    engine.prepare(case)
    answers: Sequence[Sequence[int]] = ()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(case.rounds):
        answers = engine.run(case, size)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cpu": cpu, "wall": wall, "resident": resident, "answers": [list(map(int, answer)) for answer in answers]}


def main() -> None:
    """Serve lines such as `{"case": "base", "act": "run"}` until there are no more."""
    name, folder, size = sys.argv[1], Path(sys.argv[2]), SIZES[sys.argv[3]]
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints goes to the log
    make: Callable[[str, Path], EngineUnderTest] = importlib.import_module(f"benchmarks.serving.{MODULES[name]}").make
    engine = make(name, folder)
    print(json.dumps({"versions": engine.versions}), file=channel, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        case = CASES[asked["case"]]
        answer = engine.shares(case, size) if asked["act"] == "shares" else measured(engine, case, size)
        print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    main()
