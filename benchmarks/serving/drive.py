"""Workers, one per engine, that run the cases in turn, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from benchmarks.measure import Cost, middle
from benchmarks.serving.work import CASES

REPOSITORY = Path(__file__).parents[2]
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # vLLM's engine runs in the process whose CPU time is taken.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
RUNS = {
    "toolkit": list(CASES),
    "transformers": ["base", "base, 64", "prefill, base"],
    "continuous": ["base"],
    "PEFT": ["one adapter", "16 adapters", "64 adapters", "prefill, 16 adapters"],
    "vLLM": ["base", "one adapter", "16 adapters", "prefill, base", "prefill, 16 adapters"],
}
"""Which cases each engine is asked: those that it can answer."""


class Worker:
    """An engine in a process of its own.

    Args:
        engine: one of `RUNS`.
        python: of the environment that has it.
        folder: see `work.write_all`.
        size: one of `work.SIZES`.

    Raises:
        RuntimeError: it could not be loaded; the last lines of its log are in the message.
    """

    def __init__(self, engine: str, python: str | Path, folder: Path, size: str) -> None:
        self.engine = engine
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.serving.worker", engine, str(folder.absolute()), size],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | ONE_THREAD,
        )
        self.versions: dict[str, str] = self._read()["versions"]

    def ask(self, case: str, act: str = "run") -> dict[str, Any]:
        """Run a case; see `worker`."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"case": case, "act": act}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace")[-2000:]
        raise RuntimeError(f"the worker of {self.engine} ended with {self._process.wait()}:\n{tail}")

    def close(self) -> None:
        """End it."""
        self._process.communicate()
        self._log.close()


@contextmanager
def workers(pythons: Mapping[str, str | Path], folder: Path, size: str) -> Iterator[dict[str, Worker]]:
    """Yield the engines, loaded; they end with the block."""
    with ExitStack() as stack:
        found = {}
        for engine, python in pythons.items():
            found[engine] = Worker(engine, python, folder, size)
            stack.callback(found[engine].close)
        yield found


SHORT, SHORT_TURNS = 1024, 3
"""Tokens of a case that is short, which takes about a second, and how often a round has it."""


@dataclass
class Results:
    """What was measured.

    Attributes:
        costs: of each case by each engine, one per run.
        answers: of the last run.
        shares: of our step, by part.
        versions: of what was measured.
    """

    costs: dict[tuple[str, str], list[Cost]] = field(default_factory=dict)
    answers: dict[tuple[str, str], list[list[int]]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def speed(self, case: str, engine: str) -> float | None:
        """Return tokens per CPU-second, of the median run; `None` where the engine was not asked."""
        costs = self.costs.get((case, engine))
        return CASES[case].tokens / middle(costs).cpu if costs else None

    def equal_rows(self, case: str, engine: str) -> tuple[int, int] | None:
        """Return how many of our answers are token for token another engine's, and of how many."""
        ours, theirs = self.answers.get((case, "toolkit")), self.answers.get((case, engine))
        if ours is None or theirs is None:
            return None
        return sum(one == other for one, other in zip(ours, theirs, strict=True)), len(ours)


def _turns(cases: Sequence[str]) -> list[str]:
    """Return the cases of a round: short ones come several times, in turn, for what disturbs a machine lasts as long as
    they do."""
    short = [case for case in cases if CASES[case].tokens <= SHORT]
    return SHORT_TURNS * short + [case for case in cases if case not in short]


def measure(found: Mapping[str, Worker], cases: Sequence[str], repeat: int) -> Results:
    """Run every case on every engine that can answer it, after one round that is not counted; then again, in turn."""
    results = Results()
    for worker in found.values():
        results.versions |= worker.versions
    for round_ in range(repeat + 1):
        for case in _turns(cases) if round_ else cases:
            for engine, worker in found.items():
                if case in RUNS[engine]:
                    answer = worker.ask(case)
                    results.answers[case, engine] = answer["answers"]
                    if round_:
                        cost = Cost(answer["cpu"], answer["wall"], answer["resident"])
                        results.costs.setdefault((case, engine), []).append(cost)
                        print(f"{case}: {engine}, {cost.cpu:.2f} CPU s", file=sys.stderr, flush=True)
    shown = next((case for case in ("16 adapters", "one adapter", "base") if case in cases), None)
    if shown:
        results.shares = cast(dict[str, float], found["toolkit"].ask(shown, "shares"))
    return results
