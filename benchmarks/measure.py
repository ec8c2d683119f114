"""Run commands and say what they cost, several in turn so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one run of a command took.

    Attributes:
        cpu: seconds of all its threads, imports included.
        wall: seconds on the clock.
        resident: most bytes that were resident at once.
    """

    cpu: float
    wall: float
    resident: int


def run(command: Sequence[str | Path], *, threads: int | None = None) -> Cost:
    """Run a command to its end.

    The process that measures must itself stay small: Linux counts the memory of the parent as the child's until the
    child has become another program.

    Raises:
        RuntimeError: the command failed; its last lines are in the message.
    """
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen([str(c) for c in command], stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        if process.returncode:
            log.seek(0)
            tail = log.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{command[0]} ended with {process.returncode}:\n{tail}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024)


def in_turn(commands: Mapping[str, Callable[[], Cost]], repeat: int) -> dict[str, list[Cost]]:
    """Run every command once, then every command again, `repeat` times."""
    found: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            found[name].append(command())
    return found


def middle(costs: Sequence[Cost]) -> Cost:
    """Return the median of each number."""
    return Cost(median(c.cpu for c in costs), median(c.wall for c in costs), int(median(c.resident for c in costs)))


def machine() -> dict[str, Any]:
    """Return what the numbers of a run depend on besides the programs."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def save(path: Path, benchmark: str, versions: Mapping[str, str], results: Mapping[str, Sequence[Cost]]) -> None:
    """Write all runs, with the machine and the versions."""
    data = {
        "benchmark": benchmark,
        "machine": machine(),
        "versions": dict(versions),
        "runs": {name: [asdict(cost) for cost in costs] for name, costs in results.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
