"""Serves whatever adapters lie in some folders, under the names of their own: those that come later, too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import SpecError, ToolkitError
from toolkit.serving.engine import Engine
from toolkit.serving.loop import EngineLoop
from toolkit.serving.watching import Watch

log = logging.getLogger("toolkit.serving")

Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, identity, time and size of every file of a folder."""

_MARKS = ("adapter_config.json", "delta_config.json", "config.json")
"""Of which a folder that can be served has one."""


class AdapterWatch(Watch):
    """Compares what lies in the folders with what is served.

    An adapter that is new or has changed is read once it is the same twice in a row; requests under way finish with the
    one that they began with. One that goes is forgotten. What cannot be served is refused: the log says why, and what
    was served under its name before goes on.

    Args:
        loop: of the engine.
        folders: whose own folders are adapters.
        seconds: between two looks.
    """

    def __init__(self, loop: EngineLoop, folders: Sequence[str | Path], seconds: float) -> None:
        super().__init__("adapter", seconds)
        self.loop, self.folders = loop, [Path(folder).expanduser() for folder in folders]
        self._seen: dict[str, Stamp] = {}
        self._served: set[str] = set()
        self._last = self._stamps()  # what is there from the start is at rest

    def look(self) -> None:
        """See `Watch`."""
        last, self._last = self._last, self._stamps()
        for path, stamp in self._last.items():
            if stamp != self._seen.get(path) and stamp == last.get(path):
                self._seen[path] = stamp
                self._take_up(Path(path))
        for path in [path for path in self._seen if path not in self._last and path not in last]:
            del self._seen[path]
            self._forget(Path(path))

    def _stamps(self) -> dict[str, Stamp]:
        found: dict[str, Stamp] = {}
        for folder in self.folders:
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.name.startswith(".") or not any((path / mark).is_file() for mark in _MARKS):
                    continue
                try:
                    files = [(file.name, file.stat()) for file in sorted(path.iterdir())]
                except OSError:  # a file went while we looked
                    continue
                found[str(path)] = tuple((name, s.st_ino, s.st_mtime_ns, s.st_size) for name, s in files)
        return found

    def _take_up(self, path: Path) -> None:
        name = path.name
        try:
            taken = self.loop.call(lambda engine: engine.models).result()
            if name in taken and name not in self._served:
                raise SpecError(f"the name {name!r} is served already")
            opened = self.loop.engine.open_adapter(path)
            info = self.loop.call(lambda engine: engine.add_adapter(name, path, opened)).result()
        except ToolkitError as error:
            log.warning("adapter refused", extra={"fields": {"adapter": name, "reason": " ".join(str(error).split())}})
            return
        self._served.add(name)
        log.info("adapter loaded", extra={"fields": {"adapter": name, "version": info.key}})

    def _forget(self, path: Path) -> None:
        if path.name not in self._served:
            return
        self._served.remove(path.name)
        try:
            self.loop.call(lambda engine: _remove(engine, path.name)).result()
        except ToolkitError as error:  # unloaded by a client, or a router chooses it
            log.warning("adapter kept", extra={"fields": {"adapter": path.name, "reason": str(error)}})
            return
        log.info("adapter unloaded", extra={"fields": {"adapter": path.name}})


def _remove(engine: Engine, name: str) -> None:
    if engine.router is not None and name in engine.router.experts:
        raise SpecError(f"the router chooses among {', '.join(engine.router.experts)}")
    engine.remove_adapter(name)
