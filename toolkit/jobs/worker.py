"""A process that runs steps one after another, so that libraries are imported once.

The parent writes one line of JSON per step to its standard input; it answers with lines of JSON: progress, and at
the end the result or an error. (A pool of `multiprocessing` would import the caller's main module again, which
goes wrong in scripts and notebooks that do not guard it.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit.errors import Problem, SpecError, ToolkitError
from toolkit.progress import State, redirect


class StepError(ToolkitError, RuntimeError):
    """A step failed in its process."""


class Worker:
    """The parent's end.

    Args:
        threads: of torch and of linear algebra in the process.
        log: file that gets what libraries print.
    """

    def __init__(self, threads: int, log: Path) -> None:
        self.log = log
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads))
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "toolkit.jobs.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )

    def run(self, kind: str, spec: Mapping[str, Any], out: Path, show: Callable[[State], None]) -> dict[str, Any]:
        """Run one step, passing its progress on.

        Raises:
            SpecError: the step's spec is wrong.
            StepError: the step failed, or the process died.
        """
        assert self.process.stdin
        assert self.process.stdout
        try:
            text = json.dumps({"kind": kind, "spec": spec, "out": str(out)})
        except TypeError:
            raise SpecError([Problem("", "holds objects in memory; run the recipe with workers: 1")]) from None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            message = json.loads(line)
            if "progress" in message:
                show(State(**message["progress"]))
            elif "problems" in message:
                raise SpecError([Problem(where, text) for where, text in message["problems"]])
            elif "error" in message:
                raise StepError(f"{out.name}: {message['error']}")
            else:
                return message["result"]
        raise StepError(f"{out.name}: its process ended with status {self.process.wait()}; see {self.log}")

    def stop(self) -> None:
        """End the process."""
        with self.process:  # closes its pipes, upon which it ends, and waits for it
            pass


def main() -> None:
    """Run steps from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message, default=str) + "\n")

    redirect(lambda state: send({"progress": asdict(state)}))
    from toolkit.jobs.steps import run_step

    for line in sys.stdin:
        step = json.loads(line)
        try:
            send({"result": run_step(step["kind"], step["spec"], Path(step["out"]))})
        except SpecError as error:
            send({"problems": [[problem.where, problem.message] for problem in error.problems]})
        except ToolkitError as error:
            send({"error": str(error)})
        except Exception as error:
            traceback.print_exc()
            send({"error": f"{type(error).__name__}: {error} (a fault of the toolkit; the log has the traceback)"})


if __name__ == "__main__":
    main()
