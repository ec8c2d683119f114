"""Where a model, an adapter or an encoder is: a folder, a file, a hub id, or the embedded base."""

from __future__ import annotations

import os
import re
from pathlib import Path

from toolkit.errors import CheckpointError, MissingError

EMBEDDED = "toolkit:base"
"""Name of the base that ships with the toolkit."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?$")
_SAFE = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md")
_PICKLE = ("*.bin", "*.bin.index.json")
_CODE = ("*.py",)
_TWICE = ("consolidated*.safetensors", "original/*")
"""The same weights once more, in the form of whoever trained them."""


def locate(source: str | Path, *, allow_pickle: bool = False, code: bool = False) -> Path:
    """Return the local folder or file of a model.

    Args:
        source: a path; a hub id, with `@revision` at will; or `toolkit:base`. What exists on disk is never
            looked up on the hub.
        allow_pickle: also fetch pickled weights from the hub.
        code: also fetch the Python files that come with the model.

    Raises:
        MissingError: neither a path nor a model that the hub, or its cache, can give.
    """
    text = str(source)
    if text == EMBEDDED:
        return Path(__file__).parent.parent / "embedded" / "base"
    path = Path(os.path.expanduser(text))
    if os.path.exists(path):  # unlike Path's, false of a name that no file can have
        return path
    if isinstance(source, Path) or not _HUB_ID.match(text):
        raise MissingError(f"{text}: no such folder, and not of the form of a hub id (owner/name)")
    return _from_hub(text, [*_SAFE, *(_PICKLE if allow_pickle else ()), *(_CODE if code else ())])


def _from_hub(text: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = text.partition("@")
    try:
        found = snapshot_download(
            name, revision=revision or None, allow_patterns=patterns, ignore_patterns=list(_TWICE)
        )
        return Path(found)
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError):
            raise MissingError(f"{text}: the hub answered {error.response.status_code}") from None
        raise MissingError(f"{text}: no such folder, and the hub could not be reached") from None
    except HFValidationError as error:
        raise CheckpointError(f"{text}: not a hub id ({error})") from None
