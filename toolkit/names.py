"""Folders as registries: list the methods in a package, load one, answer an unknown name helpfully."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType

from toolkit.errors import UnsupportedError


def available(package: str) -> tuple[str, ...]:
    """List the public modules of `package` (a dotted name) without importing any of them."""
    root = importlib.import_module(package)
    return tuple(sorted(m.name for m in pkgutil.iter_modules(root.__path__) if not m.name.startswith("_")))


def load(package: str, name: str, kind: str) -> ModuleType:
    """Import the module `name` of `package`.

    Args:
        package: dotted name of the folder that is the registry.
        name: name of the method, which is the name of its file.
        kind: what to call it in the error, such as "merge method".

    Raises:
        UnsupportedError: no such module; the message suggests the nearest name and lists all.
    """
    names = available(package)
    if name not in names:
        raise UnsupportedError(f"unknown {kind} {name!r}{did_you_mean(name, names)} (known: {', '.join(names)})")
    return importlib.import_module(f"{package}.{name}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest of `known`, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
