"""Contents of adapters on the host: read in the background, kept while there is room, least recently used out first.

(Prabhakar et al., "SambaNova SN40L: Scaling the AI Memory Wall with Dataflow and Composition of Experts", 2024,
arXiv:2405.07518, keeps all experts in a large slow memory and the used ones in a small fast one.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from toolkit.errors import ToolkitError
from toolkit.serving.adapters.contents import Contents


class HostTier:
    """Contents by key, at most so many bytes of them, but always those that a request needs together.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self._held: OrderedDict[str, Contents] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def put(self, key: str, contents: Contents, needed: Collection[str] = ()) -> None:
        """Keep contents, and let others go first to make room for them, but none that are needed with them."""
        self.drop(key)
        others = [other for other in self._held if other not in needed]
        while others and self.nbytes + contents.nbytes > self.capacity:
            self.drop(others.pop(0))
        self._held[key] = contents
        self.nbytes += contents.nbytes

    def get(self, key: str) -> Contents:
        """Return contents that are here, as used just now."""
        self._held.move_to_end(key)
        return self._held[key]

    def drop(self, key: str) -> None:
        """Let contents go, if they are here."""
        contents = self._held.pop(key, None)
        if contents is not None:
            self.nbytes -= contents.nbytes


MOST_COMING = 24
"""Contents that are read, or have been and were not collected yet."""

MOST_AHEAD = 16
"""The same of those that requests farther back in the queue will ask for; the others are for who is next."""


class Loader:
    """Reads contents in a thread of its own, those of a request all or none.

    Attributes:
        failures: why contents could not be read, by key; whoever deals with one takes it out.
        num_loads: read so far.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._coming: dict[str, Future[Contents]] = {}
        self.failures: dict[str, str] = {}
        self.num_loads = 0

    def ask(self, keys: Sequence[str], read: Callable[[str], Contents], most: int = MOST_COMING) -> bool:
        """Begin to read what is not being read yet; `False` if so much is coming already that it must wait."""
        new = [key for key in keys if key not in self._coming]
        if self._coming and len(self._coming) + len(new) > most:
            return False
        for key in new:
            self._coming[key] = self._threads.submit(read, key)
        return True

    def collect(self, keys: Sequence[str]) -> dict[str, Contents]:
        """Return what was asked for, once, when all of it has been read; what could not be is among the failures."""
        if not all(key in self._coming and self._coming[key].done() for key in keys):
            return {}
        found = {key: self._result(key) for key in keys}
        return {key: contents for key, contents in found.items() if contents is not None}

    def _result(self, key: str) -> Contents | None:
        try:
            contents = self._coming.pop(key).result()
        except ToolkitError as error:
            self.failures[key] = str(error)
        except Exception as error:  # whatever a file that changed under the reader raises
            self.failures[key] = f"an adapter could not be read: {' '.join(str(error).split())[:200]}"
        else:
            self.num_loads += 1
            return contents
        return None

    def forget(self, key: str) -> None:
        """Give up what is being read."""
        self.failures.pop(key, None)
        future = self._coming.pop(key, None)
        if future is not None:
            future.cancel()

    def wait(self, seconds: float) -> None:
        """Wait until something has been read, but not for longer."""
        if self._coming:
            wait(self._coming.values(), timeout=seconds, return_when="FIRST_COMPLETED")

    def close(self) -> None:
        """Stop; what is being read is thrown away."""
        self._threads.shutdown(wait=True, cancel_futures=True)
