"""What a router sees of prompts: hidden states, words and form, brought to one scale and put side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from toolkit.progress import track
from toolkit.routing import form, words
from toolkit.routing.embedding import Embedder, open_embedder
from toolkit.routing.ops import State, check_arrays, inside, within
from toolkit.routing.spec import FeaturesSpec

BATCH = 256
"""Prompts that are embedded at once."""


class Features:
    """Turns prompts into vectors.

    Each kind of features is centred and divided by the root mean square of its length (form: each number by its own
    deviation), as the prompts of the fit had them. What was fitted never changes when an expert is added.

    Args:
        spec: which features.
        state: what was fitted; without it vectors are as they come.
        embedder: the embedding, loaded; by default it is loaded when first needed.
    """

    def __init__(self, spec: FeaturesSpec, state: State | None = None, embedder: Embedder | None = None) -> None:
        self.spec, self.state = spec, dict(state or {})
        self._embedder = embedder

    @property
    def embedder(self) -> Embedder:
        """The loaded embedding."""
        if self._embedder is None:
            assert self.spec.embedding is not None
            self._embedder = open_embedder(self.spec.embedding)
        return self._embedder

    @embedder.setter
    def embedder(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def fit(self, prompts: Sequence[str], *, quiet: bool = False) -> Any:
        """Learn words and scales; return the vectors of the prompts."""
        self.state = within("words", words.fit(prompts, self.spec.words)) if self.spec.words else {}
        parts = self._parts(prompts, quiet=quiet)
        for name, part in parts.items():
            if not sparse.issparse(part):
                self.state |= within(name, _scales(part, name, self.spec.form))
        return self._joined(parts)

    def __call__(self, prompts: Sequence[str]) -> Any:
        """Return `[len(prompts), H]` float32; sparse where the words are."""
        return self._joined(self._parts(prompts, quiet=True))

    def check(self) -> None:
        """Raise a `CheckpointError` where the state is not one that `fit` leaves."""
        if self.spec.words:
            words.check(inside(self.state, "words"), self.spec.words)
        if self.spec.form:
            check_arrays(self.state, dict.fromkeys(("form.mean", "form.scale"), (len(form.NAMES),)))

    def _parts(self, prompts: Sequence[str], *, quiet: bool) -> dict[str, Any]:
        parts = {}
        if self.spec.embedding:
            parts["embedding"] = self._embedded(prompts, quiet)
        if self.spec.words:
            parts["words"] = words.vectors(prompts, inside(self.state, "words"))
        if self.spec.form:
            parts["form"] = form.vectors(prompts)
        return parts

    def _embedded(self, prompts: Sequence[str], quiet: bool) -> Any:
        vectors = []
        with track("embedding prompts", len(prompts), unit="prompts", quiet=quiet) as progress:
            for first in range(0, len(prompts), BATCH):
                vectors.append(self.embedder(prompts[first : first + BATCH]))
                progress.advance(len(vectors[-1]))
        return np.concatenate(vectors)

    def _joined(self, parts: dict[str, Any]) -> Any:
        scaled = [self._scaled(name, part) for name, part in parts.items()]
        if any(sparse.issparse(part) for part in scaled):
            return sparse.csr_array(sparse.hstack([sparse.csr_array(part) for part in scaled]))
        return np.concatenate(scaled, axis=1)

    def _scaled(self, name: str, part: Any) -> Any:
        mean, scale = self.state.get(f"{name}.mean"), self.state.get(f"{name}.scale")
        if mean is None or scale is None or part.shape[1] != mean.size:
            return part  # of another width: the router says so
        return (part - mean) * scale


def _scales(part: Any, name: str, weight: float) -> dict[str, Any]:
    """Return the mean of a kind of features, and what brings it to a root mean square length of 1, or `weight`."""
    x = part.astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    if name == "form":
        varied = deviation > 1e-6
        scale = np.where(varied, weight / np.sqrt(max(varied.sum(), 1)) / np.where(varied, deviation, 1), 0)
    else:
        scale = np.full(x.shape[1], 1 / max(np.sqrt(np.square(deviation).sum()), 1e-12))
    return {"mean": mean.astype(np.float32), "scale": scale.astype(np.float32)}
