"""Work lists that keep their place on the device, so that a captured graph finds them there at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

Row = tuple[int, ...]


@dataclass(frozen=True)
class Room:
    """What a list may grow to.

    Attributes:
        rows: most of them.
        width: numbers of a row.
        fill: the row that follows those that there are; by default the last one again.
    """

    rows: int
    width: int = 1
    fill: Row | None = None


class FixedLists:
    """Lists in one tensor, each followed by rows without work up to the most that it may have.

    Args:
        rooms: of every list.
        make: returns what belongs into them now, `[rows, width]` or flat.
        device: where they are.
        dtype: of their numbers.

    Attributes:
        tensors: the lists, `[rows, width]`.

    Raises:
        ValueError: a list is longer than its room.
    """

    def __init__(
        self,
        rooms: Mapping[str, Room],
        make: Callable[[], Mapping[str, np.ndarray]],
        device: torch.device,
        dtype: torch.dtype = torch.int32,
    ) -> None:
        self._rooms, self._make = dict(rooms), make
        sizes = [room.rows * room.width for room in rooms.values()]
        self._flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
        parts = zip(rooms.items(), self._flat.split(sizes), strict=True)
        self.tensors = {name: part.view(room.rows, room.width) for (name, room), part in parts}
        self.refresh()

    def refresh(self) -> None:
        """Make the lists anew, in their places."""
        made = self._make()
        full = [_filled(np.asarray(made[name], np.int64), room, name) for name, room in self._rooms.items()]
        self._flat.copy_(torch.from_numpy(np.concatenate(full)))


def _filled(rows: np.ndarray, room: Room, name: str) -> np.ndarray:
    """Return the flat list at its full length."""
    rows = rows.reshape(-1, room.width)
    if len(rows) > room.rows:
        raise ValueError(f"{name}: {len(rows)} rows where {room.rows} have room")
    full = np.zeros((room.rows, room.width), np.int64)
    full[: len(rows)] = rows
    full[len(rows) :] = room.fill if room.fill is not None else (rows[-1] if len(rows) else 0)
    return full.ravel()
