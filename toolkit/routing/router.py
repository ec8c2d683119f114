"""What a router is, how it is fitted, saved and loaded.

A kind of router is one module in `toolkit/routing/routers` that declares

- `class Params(Spec)`: its parameters;
- `fit(vectors [B, H], experts [B], num_experts, params) -> state`: learn from prompts whose expert is known,
  where `state` maps names to float32 arrays;
- `score(vectors [B, H], state) -> [B, N]`: one score per prompt and expert, the larger the better;
- `check(state, num_experts)`: raise a `CheckpointError` where a state that was read is not one that `fit` returns.

A saved router is a folder: `router.json` and the arrays as safetensors. Nothing in it is code, and nothing in it can
allow the model of its embedding to run code: only who loads it can.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import names, specs
from toolkit.checkpoints.companions import versions
from toolkit.checkpoints.dtypes import DTYPES
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import open_checkpoint, read_json
from toolkit.checkpoints.writer import check_free, staged, write_text, write_weights
from toolkit.data.rows import read_rows, user_text
from toolkit.errors import CheckpointError, MissingError, Problem, SpecError, UnsupportedError
from toolkit.progress import track
from toolkit.routing.embedding import Embedder, EmbeddingSpec, Vectors, open_embedder
from toolkit.routing.spec import RouteSpec
from toolkit.tables import Table

ROUTERS = "toolkit.routing.routers"
CONFIG = "router.json"
BATCH = 256
State = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Choice:
    """What a router chose for one prompt.

    Attributes:
        expert: name of the best.
        scores: of all experts.
    """

    expert: str
    scores: dict[str, float]

    @property
    def margin(self) -> float | None:
        """How far the best is ahead of the second, where there is one."""
        ranked = sorted(self.scores.values(), reverse=True)
        return ranked[0] - ranked[1] if len(ranked) > 1 else None


class Router:
    """Chooses an expert for a prompt.

    Args:
        kind: name of its module.
        experts: names, in the order of the scores.
        state: what was learned.
        embedding: where its vectors come from.
        embedder: that embedding, loaded; by default it is loaded when first needed.
    """

    def __init__(
        self,
        kind: str,
        experts: Sequence[str],
        state: State,
        embedding: EmbeddingSpec,
        embedder: Embedder | None = None,
    ) -> None:
        self.kind, self.experts, self.state, self.embedding = kind, tuple(experts), dict(state), embedding
        self.module = _load(kind)
        self._embedder = embedder

    @property
    def embedder(self) -> Embedder:
        """The loaded embedding."""
        if self._embedder is None:
            self._embedder = open_embedder(self.embedding)
        return self._embedder

    @embedder.setter
    def embedder(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def score(self, prompts: Sequence[str]) -> Vectors:
        """Return `[B, N]`, a score per prompt and expert."""
        return self.module.score(self.embedder(prompts), self.state)

    def choose(self, prompts: Sequence[str]) -> list[Choice]:
        """Return the best expert for each prompt; of equals the first."""
        if not prompts:
            return []
        scores = self.score(prompts)
        return [
            Choice(self.experts[int(row.argmax())], dict(zip(self.experts, map(float, row), strict=True)))
            for row in scores
        ]

    @property
    def version(self) -> str:
        """Identity of what the router computes: 16 hex digits."""
        digest = hashlib.blake2b(json.dumps(self._config()).encode(), digest_size=8)
        for name in sorted(self.state):
            digest.update(self.state[name].tobytes())
        return digest.hexdigest()

    def _config(self) -> dict[str, Any]:
        embedding = self.embedding.model_dump(mode="json", exclude={"trust_remote_code"})
        return {"router": self.kind, "experts": list(self.experts), "embedding": embedding}

    def to_dict(self) -> dict[str, Any]:
        """Return what the router is, as JSON can hold it."""
        return {**self._config(), "version": self.version}

    def table(self) -> Table:
        """Return what the router is."""
        rows = [[key, ", ".join(v) if isinstance(v, list) else str(v)] for key, v in self.to_dict().items()]
        return Table(("router", self.kind), rows[1:])

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def save(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Write the router as a folder.

        Raises:
            UnsupportedError: the embedding is a model in memory, which no file can name.
        """
        if not isinstance(self.embedding.model, str | Path):
            raise UnsupportedError("a router whose embedding is a model in memory cannot be saved; name its folder")
        arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in self.state.items()}
        tensors = [TensorInfo(name, DTYPES["F32"], value.shape) for name, value in arrays.items()]
        with staged(Path(out), overwrite=overwrite) as partial:
            write_weights(partial, tensors, {n: v.reshape(-1).view(np.uint8) for n, v in arrays.items()}, stem="router")
            config = {**self._config(), "version": self.version, "made_with": versions("transformers")}
            write_text(partial / CONFIG, json.dumps(config, indent=2) + "\n")


def load_router(source: Router | str | Path, *, trust_remote_code: bool = False) -> Router:
    """Load a saved router.

    Args:
        source: its folder; or a router, which is returned as it is.
        trust_remote_code: run code that comes with the model of its embedding, whatever the folder says of it.

    Raises:
        MissingError: nothing there, or no router.
        CheckpointError: broken files, or files that do not belong together.
    """
    if isinstance(source, Router):
        return source
    folder = locate(source)
    if not (folder / CONFIG).is_file():
        raise MissingError(f"{source}: no {CONFIG} in this folder")
    kind, experts, embedding = _read_config(folder / CONFIG)
    embedding = embedding.model_copy(update={"trust_remote_code": trust_remote_code})
    router = Router(kind, experts, _read_state(folder), embedding)
    try:
        router.module.check(router.state, len(experts))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: not a {kind} router of {len(experts)} experts: {error}") from None
    return router


def _read_config(path: Path) -> tuple[str, list[str], EmbeddingSpec]:
    config = read_json(path)
    kind, experts = config.get("router"), config.get("experts")
    if kind not in names.available(ROUTERS):
        raise CheckpointError(f"{path}: router: {kind!r} is no router (known: {', '.join(names.available(ROUTERS))})")
    named = isinstance(experts, list) and all(isinstance(name, str) for name in experts)
    if not named or not experts or len(set(experts)) < len(experts):
        raise CheckpointError(f"{path}: experts: expected a list of different names, got {experts!r}")
    embedding = config.get("embedding")
    if not isinstance(embedding, dict) or not isinstance(embedding.get("model"), str):
        raise CheckpointError(f"{path}: embedding: expected a block that names its model, got {embedding!r}")
    settings = {key: value for key, value in embedding.items() if key != "trust_remote_code"}
    try:
        return kind, experts, specs.validate(settings, EmbeddingSpec, name="embedding")
    except SpecError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_state(folder: Path) -> dict[str, NDArray[np.float32]]:
    state: dict[str, NDArray[np.float32]] = {}
    with open_checkpoint(folder / "router.safetensors") as weights:
        for name, info in weights.tensors.items():
            state[name] = np.empty(info.shape, np.float32)
            weights.read(name, 0, info.count, state[name].reshape(-1))
    return state


def fit_router(
    spec: specs.Source | RouteSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    embedder: Embedder | None = None,
) -> Router:
    """Fit a router as a spec says, and save it where the spec or the caller names a folder.

    Args:
        spec: a YAML file, a dict or a `RouteSpec`.
        out: folder to write, instead of the spec's own.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.
        overwrite: replace `out` if it exists.
        quiet: show no progress.
        embedder: the embedding, when it is loaded already.

    Raises:
        SpecError: the spec is wrong.
        DataError: a row without a prompt.
        OutputError: `out` exists.
    """
    loaded = specs.load(spec, RouteSpec, overrides=overrides, smoke=smoke)
    folder = out or loaded.out
    if folder:
        check_free(Path(folder), overwrite=overwrite)
    try:
        module = _load(loaded.router)
    except UnsupportedError as error:
        raise loaded.error([Problem("router", str(error))]) from None
    params = _params(module, loaded)
    prompts: list[str] = []
    labels: list[int] = []
    for index, expert in enumerate(loaded.experts.values()):
        rows = read_rows(expert.data)[: expert.limit]
        prompts += [user_text(row) for row in rows]
        labels += [index] * len(rows)
    embedder = embedder or open_embedder(loaded.embedding)
    vectors: list[Vectors] = []
    with track("embedding prompts", len(prompts), unit="prompts", quiet=quiet) as progress:
        for first in range(0, len(prompts), BATCH):
            vectors.append(embedder(prompts[first : first + BATCH]))
            progress.advance(len(vectors[-1]))
    state = module.fit(np.concatenate(vectors), np.array(labels), len(loaded.experts), params)
    router = Router(loaded.router, list(loaded.experts), state, loaded.embedding, embedder)
    if folder:
        router.save(folder, overwrite=overwrite)
    return router


def _load(kind: str) -> ModuleType:
    return names.load(ROUTERS, kind, "router")


def _params(module: ModuleType, spec: RouteSpec) -> Any:
    try:
        return specs.validate(spec.parameters, module.Params)
    except SpecError as error:
        raise spec.error([Problem(f"parameters.{p.where}", p.message) for p in error.problems]) from None
