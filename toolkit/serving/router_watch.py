"""Looks after the folder of a server's router: what is written there anew is taken up while requests go on."""

from __future__ import annotations

import logging
from concurrent.futures import CancelledError

from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import read_json
from toolkit.errors import CheckpointError, ToolkitError
from toolkit.routing.router import CONFIG, WEIGHTS, Router, load_router
from toolkit.serving.assemble import same_model
from toolkit.serving.loop import EngineLoop
from toolkit.serving.watching import Watch

log = logging.getLogger("toolkit.serving")
Stamp = tuple[tuple[int, int, int], ...] | None
"""Identity, time and size of each file; none while one is missing."""


class RouterWatch(Watch):
    """Compares the folder with what it was.

    A router is read, and its embedding loaded, beside the engine; the engine only changes to it, between two steps.
    One that is broken, half written or over experts that are not served is refused: the log and the metrics say so,
    and the router before it goes on.

    Args:
        loop: of the engine, whose router came from a folder.
        seconds: between two looks; a folder is read when it is the same twice in a row.
    """

    def __init__(self, loop: EngineLoop, seconds: float) -> None:
        super().__init__("router", seconds)
        self.loop = loop
        assert loop.engine.routing.source is not None
        self.folder = locate(loop.engine.routing.source)
        self._seen: Stamp = None  # so that the first look sees what came since the engine read it
        self._last: Stamp = None

    def look(self) -> None:
        """See `Watch`."""
        last, self._last = self._last, self._stamp()
        if self._last in (self._seen, None) or self._last != last:
            return
        try:
            router = self._read()
        except ToolkitError as error:
            if self._stamp() == self._last:  # else it is still being written
                self._refuse(str(error))
            return
        if self._stamp() != self._last:
            return
        self._seen = self._last
        if router.version != self.loop.engine.routing.version:
            self._take_up(router)

    def _read(self) -> Router:
        router = load_router(self.folder)
        said = read_json(self.folder / CONFIG).get("version", router.version)
        if said != router.version:
            message = f"{self.folder}: {CONFIG} says version {said}, and the content is {router.version}: half written,"
            raise CheckpointError(f"{message} or changed by hand (then leave `version` out)")
        spec, engine = router.embedding, self.loop.engine
        if spec is not None and not same_model(spec.model, engine.source):
            old = engine.router
            router.embedder = old.embedder if old is not None and old.embedding == spec else router.embedder
        return router

    def _take_up(self, router: Router) -> None:
        try:
            self.loop.call(lambda engine: engine.set_router(router, str(self.folder))).result()
        except CancelledError:
            raise
        except Exception as error:
            self._refuse(str(error) if isinstance(error, ToolkitError) else f"it cannot decide ({error!r})")
            return
        fields = {"version": router.version, "router": router.kind, "experts": len(router.experts)}
        log.info("router reloaded", extra={"fields": fields})

    def _refuse(self, reason: str) -> None:
        self._seen = self._last
        reason = " ".join(reason.split())
        self.loop.call(lambda engine: engine.routing.refuse(reason)).result()
        log.warning("router refused", extra={"fields": {"reason": reason, "version": self.loop.engine.routing.version}})

    def _stamp(self) -> Stamp:
        try:
            found = [(self.folder / name).stat() for name in (CONFIG, WEIGHTS)]
        except OSError:
            return None
        return tuple((file.st_ino, file.st_mtime_ns, file.st_size) for file in found)


def watch_of(loop: EngineLoop, seconds: float) -> RouterWatch | None:
    """Return the watch of an engine's router; none where there is no folder to look after, or nobody is to look."""
    return RouterWatch(loop, seconds) if loop.engine.routing.source is not None and seconds > 0 else None
