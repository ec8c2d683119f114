"""Variants of every kind, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serving import variants as kinds


@pytest.fixture(scope="session")
def variants(base: Path, loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """LoRAs, other adapters, full fine-tunes and compressed deltas of the tiny base, by name."""
    return {**loras, **kinds.save_all(base, tmp_path_factory.mktemp("variants"))}


@pytest.fixture(scope="session")
def oracle(base: Path, variants: dict[str, Any]) -> kinds.Oracle:
    """The model that each of them is."""
    return kinds.Oracle(base, variants)
