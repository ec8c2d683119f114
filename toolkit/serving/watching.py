"""Looking after folders in a thread of its own, while the engine goes on."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from concurrent.futures import CancelledError

log = logging.getLogger("toolkit.serving")


class Watch(ABC):
    """Looks at something again and again.

    Args:
        what: is looked after, for the log.
        seconds: between two looks; the first comes at once.
    """

    def __init__(self, what: str, seconds: float) -> None:
        self.what, self.seconds = what, seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{what} watch", daemon=True)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, after the look under way; before the engine stops, which answers it."""
        self._stopped.set()
        self._thread.join()

    @abstractmethod
    def look(self) -> None:
        """Take up what has changed and come to rest."""

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.look()
            except CancelledError:
                return
            except Exception:
                log.exception("looking after the %s failed; the next look comes in %s seconds", self.what, self.seconds)
            self._stopped.wait(self.seconds)
