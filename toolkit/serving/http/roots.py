"""Which folders of the disk a request may name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from toolkit.serving.http.errors import ApiError


class Roots:
    """Folders that adapters may be loaded from at the request of a client.

    Args:
        folders: with all that is below them; none allows no path at all.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self.folders = [Path(os.path.realpath(os.path.expanduser(folder))) for folder in folders]

    def resolve(self, path: str) -> Path:
        """Return the folder that a client's path means: absolute, or relative to a root.

        Links are followed before the check, those of the folder's own files as well, so nothing outside of the roots
        is opened. A path outside is refused the same way whether something is there or not.

        Raises:
            ApiError: no roots, a path outside of them, or no such folder.
        """
        if not self.folders:
            message = "this server takes no paths of adapters; start it with --adapter-root FOLDER to allow some"
            raise ApiError(403, message, "path_not_allowed")
        found = [place for root in self.folders if (place := self._inside(os.path.join(root, path)))]
        if not found:
            raise ApiError(403, f"path {path!r} is outside of the folders that adapters may come from", _OUTSIDE)
        folder = next((place for place in found if place.is_dir()), None)
        if folder is None:
            raise ApiError(404, f"path {path!r}: no such folder", "path_not_found")
        for entry in sorted(os.listdir(folder)):
            if not self._inside(os.path.join(folder, entry)):
                raise ApiError(403, f"path {path!r}: {entry!r} in it links to outside of the allowed folders", _OUTSIDE)
        return folder

    def _inside(self, path: str) -> Path | None:
        """Return where a path leads, if that is inside of a root."""
        try:
            place = Path(os.path.realpath(path))
        except (ValueError, OSError):  # a null byte; a lone surrogate
            return None
        return place if any(place.is_relative_to(root) for root in self.folders) else None


_OUTSIDE = "path_not_allowed"
