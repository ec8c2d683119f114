"""The errors a user can meet.

Every class is also a standard exception, so `except ValueError` works as usual. A message says what was
given, what was expected, where, and what to do, in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ToolkitError(Exception):
    """Something the user can mend; the command line prints it without a traceback."""


@dataclass(frozen=True)
class Problem:
    """One fault of a spec: where it is (`models[1].parameters.weight`) and what is wrong."""

    where: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        place = self.where or "top level"
        return f"{place}: {self.message}" if self.line is None else f"line {self.line}: {place}: {self.message}"


class SpecError(ToolkitError, ValueError):
    """A spec that cannot be run; holds all its problems at once."""

    def __init__(self, problems: Sequence[Problem] | str, source: str = "") -> None:
        found = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        self.problems: tuple[Problem, ...] = tuple(found)
        self.source = source
        prefix = f"{source}: " if source else ""
        if isinstance(problems, str):
            text = prefix + problems
        elif len(found) == 1:
            text = prefix + str(found[0])
        else:
            text = f"{prefix}{len(found)} problems\n" + "\n".join(f"  {problem}" for problem in found)
        super().__init__(text)


class CheckpointError(ToolkitError, ValueError):
    """Weights, a config or an adapter on disk that are not what they claim to be."""


class MissingError(ToolkitError, FileNotFoundError):
    """A file, folder or model that is not there."""

    def __str__(self) -> str:
        return str(self.args[0])


class OutputError(ToolkitError, OSError):
    """An output that cannot be written: it exists already, the disk is full, somebody else writes it."""

    def __str__(self) -> str:
        return str(self.args[0])


class DataError(ToolkitError, ValueError):
    """A row of training or evaluation data that cannot be used; names file and line."""


class UnsupportedError(ToolkitError, RuntimeError):
    """A combination that is well formed but cannot be done."""


class RequestError(ToolkitError, ValueError):
    """A request to the serving engine that cannot be run.

    Attributes:
        code: OpenAI's name for the fault, such as `model_not_found`, where it has one.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code
