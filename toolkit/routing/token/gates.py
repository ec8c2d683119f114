"""Gates that lie beside the adapters they were trained for: a vector per linear, in the adapter's own folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from toolkit.checkpoints.companions import versions
from toolkit.checkpoints.reader import read_json
from toolkit.checkpoints.writer import check_free, write_text
from toolkit.errors import CheckpointError, MissingError
from toolkit.routing.token.arrays import read_arrays, write_arrays
from toolkit.routing.token.experts import Expert


def check_gate_free(expert: Expert, kind: str, *, overwrite: bool) -> None:
    """Refuse an adapter that has a gate already, unless it may be overwritten.

    Raises:
        OutputError: it has one.
    """
    if not overwrite:
        check_free(expert.folder / f"{kind}.json", overwrite=False)


def write_gate(expert: Expert, kind: str, vectors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write `{kind}.safetensors` and, last, `{kind}.json` into the folder of an adapter."""
    path = expert.folder / f"{kind}.json"
    path.unlink(missing_ok=True)  # it says what the tensors are of, so it is never there without them
    write_arrays(expert.folder, kind, vectors)
    text = json.dumps({"adapter": expert.key, **about, "made_with": versions("torch", "transformers")}, indent=2)
    write_text(path, text + "\n")


def read_gate(expert: Expert, kind: str) -> dict[str, Tensor]:
    """Read the vector `[K]` of every linear.

    Raises:
        MissingError: the adapter has no gate.
        CheckpointError: it was trained for another content, or does not fit the adapter.
    """
    path = expert.folder / f"{kind}.json"
    if not path.is_file():
        raise MissingError(f"{expert.folder}: no {kind}.json beside the adapter; train it with toolkit route gates")
    if read_json(path).get("adapter") != expert.key:
        raise CheckpointError(f"{path}: trained for another content of the adapter; train it anew")
    vectors = read_arrays(expert.folder, kind)
    shapes = {site: (pair.a_rK.shape[1],) for site, pair in expert.pairs.items()}
    if {site: tuple(vector.shape) for site, vector in vectors.items()} != shapes:
        raise CheckpointError(f"{path}: its vectors are not those of the adapter's linears")
    return vectors
