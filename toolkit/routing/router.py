"""What a router is, and its folder.

A kind of router is one module in `toolkit/routing/routers` that declares

- `class Params(Spec)`: its parameters;
- `fit(vectors [B, H], examples, params) -> state`: learn from prompts and what each expert is worth there, where
  `state` maps names to float32 arrays;
- `score(vectors [B, H], state) -> [B, N]`: one score per prompt and expert, the larger the better;
- `check(state, num_experts)`: raise a `CheckpointError` where a state that was read is not one that `fit` returns;
- `SCORES`: `"quality"` where a score that was learned from measured answers predicts what the answer is worth, else
  `"log_probability"`, `"preference"` or `"similarity"`, of which only the order, or the difference, means something;
- optionally `SPARSE = True`, where `fit` and `score` take sparse vectors;
- optionally `add(state, vectors) -> state`: append an expert by its prompts and leave the others' scores, bit for bit.

A saved router is a folder: `router.json` and the arrays as safetensors. Nothing in it is code, and nothing in it can
allow the model of its embedding to run code: only who loads it can.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
from toolkit.checkpoints.writer import staged, write_text, write_weights
from toolkit.errors import CheckpointError, MissingError, SpecError, UnsupportedError
from toolkit.routing import drift
from toolkit.routing.embedding import Embedder, EmbeddingSpec
from toolkit.routing.features import Features
from toolkit.routing.ops import State, Vectors, check_arrays, inside, within
from toolkit.routing.policy import Choice, PolicySpec, check_policy, decide
from toolkit.routing.scope import novelty
from toolkit.routing.spec import FeaturesSpec
from toolkit.tables import Table

__all__ = ["Choice", "Router", "kind_module", "load_router"]

ROUTERS = "toolkit.routing.routers"
CONFIG = "router.json"
WEIGHTS = "router.safetensors"
FORMAT = 2
"""Of the folder; it changes when an older toolkit would misread a new folder."""


class Router:
    """Chooses an expert for a prompt.

    Args:
        kind: name of its module.
        experts: names, in the order of the scores.
        state: what was learned.
        features: what it sees of a prompt.
        policy: how a choice follows from the scores.
        references: `[R, H]` prompts of the fit that novelty is measured by.
        domains: category -> mean quality of each expert on the prompts of the fit, to compare with.
        histograms: of scores at the fit, by which drift is told; see `toolkit.routing.drift`.
    """

    def __init__(
        self,
        kind: str,
        experts: Sequence[str],
        state: State,
        features: Features,
        policy: PolicySpec | None = None,
        references: Vectors | None = None,
        domains: Mapping[str, list[float]] | None = None,
        histograms: State | None = None,
    ) -> None:
        self.kind, self.experts, self.state, self.features = kind, tuple(experts), dict(state), features
        self.module = kind_module(kind)
        self.policy, self.references, self.domains = policy or PolicySpec(), references, dict(domains or {})
        self.histograms = dict(histograms or {})

    @property
    def embedding(self) -> EmbeddingSpec | None:
        """The model that prompts are embedded with, where there is one."""
        return self.features.spec.embedding

    @property
    def embedder(self) -> Embedder:
        """That model, loaded."""
        return self.features.embedder

    @embedder.setter
    def embedder(self, embedder: Embedder) -> None:
        self.features.embedder = embedder

    def score(self, prompts: Sequence[str]) -> Vectors:
        """Return `[B, N]`, a score per prompt and expert."""
        return self.module.score(self.features(prompts), self.state)

    def choose(self, prompts: Sequence[str]) -> list[Choice]:
        """Return what the policy chooses for each prompt; of equals the first."""
        if not prompts:
            return []
        vectors = self.features(prompts)
        distance = None if self.references is None else novelty(vectors, self.references)
        return decide(self.module.score(vectors, self.state), self.experts, self.policy, distance)

    def drift(self, prompts: Sequence[str]) -> dict[str, float]:
        """Return how far the scores of prompts are distributed from those of the fit; see `toolkit.routing.drift`."""
        return drift.index(self.score(prompts), self.histograms)

    def add(self, expert: str, prompts: Sequence[str]) -> Router:
        """Return a router with one more expert, from prompts that were made for it.

        The features, and the other experts' scores, stay the same to the bit. The histograms of the fit go, for the
        best of more scores is distributed in another way.

        Raises:
            UnsupportedError: the kind has to be fitted anew, or the expert is there already.
        """
        if not hasattr(self.module, "add"):
            able = [n for n in names.available(ROUTERS) if hasattr(kind_module(n), "add")]
            raise UnsupportedError(f"a {self.kind} router is fitted anew for a new expert (not so: {', '.join(able)})")
        if expert in self.experts:
            raise UnsupportedError(f"the router has an expert {expert!r} already")
        state = self.module.add(self.state, self.features(prompts))
        return self.changed(experts=(*self.experts, expert), state=state, domains={}, histograms={})

    def changed(self, **changes: Any) -> Router:
        """Return a router with other values of some of the constructor's arguments."""
        own = ("kind", "experts", "state", "features", "policy", "references", "domains", "histograms")
        return Router(**({name: getattr(self, name) for name in own} | changes))

    @property
    def version(self) -> str:
        """Identity of what the router decides: 16 hex digits."""
        digest = hashlib.blake2b(json.dumps(self._config()).encode(), digest_size=8)
        for name, value in sorted(self._arrays().items()):
            digest.update(name.encode() + value.tobytes())
        return digest.hexdigest()

    def _arrays(self) -> dict[str, NDArray[np.float32]]:
        scope = {} if self.references is None else {"scope.references": self.references}
        found = within("router", self.state) | within("features", self.features.state) | scope
        found |= within("drift", self.histograms)
        return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}

    def _config(self) -> dict[str, Any]:
        features = self.features.spec.model_dump(mode="json", exclude={"embedding": {"trust_remote_code"}})
        return {
            "router": self.kind,
            "experts": list(self.experts),
            "features": {name: value for name, value in features.items() if value},
            "policy": self.policy.model_dump(mode="json", exclude_defaults=True),
        }

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
        if self.embedding is not None and not isinstance(self.embedding.model, str | Path):
            raise UnsupportedError("a router whose embedding is a model in memory cannot be saved; name its folder")
        arrays = self._arrays()
        tensors = [TensorInfo(name, DTYPES["F32"], value.shape) for name, value in arrays.items()]
        raw = {name: value.reshape(-1).view(np.uint8) for name, value in arrays.items()}
        config = {"format": FORMAT, **self.to_dict(), "domains": self.domains, "made_with": versions("transformers")}
        with staged(Path(out), overwrite=overwrite) as partial:
            write_weights(partial, tensors, raw, stem="router")
            write_text(partial / CONFIG, json.dumps(config, indent=2) + "\n")


def kind_module(kind: str) -> ModuleType:
    """Import the module of a kind of router.

    Raises:
        UnsupportedError: no such kind.
    """
    return names.load(ROUTERS, kind, "router")


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
    config = _read_config(folder / CONFIG)
    arrays = _read_arrays(folder)
    spec = _block(folder / CONFIG, config, "features", FeaturesSpec)
    if spec.embedding:
        trusted = spec.embedding.model_copy(update={"trust_remote_code": trust_remote_code})
        spec = spec.model_copy(update={"embedding": trusted})
    policy = _block(folder / CONFIG, config, "policy", PolicySpec)
    features = Features(spec, inside(arrays, "features"))
    kind, experts = config["router"], config["experts"]
    references = arrays.get("scope.references")
    state, histograms = inside(arrays, "router"), inside(arrays, "drift")
    router = Router(kind, experts, state, features, policy, references, config.get("domains"), histograms)
    try:
        drift.check(histograms)
        router.module.check(router.state, len(experts))
        features.check()
        if references is not None:
            check_arrays(arrays, {"scope.references": (-1, -1)})
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: not a {kind} router of {len(experts)} experts: {error}") from None
    return router


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if config.get("format") != FORMAT:
        given = config.get("format", 1)
        raise CheckpointError(f"{path}: format {given!r}, and this toolkit reads {FORMAT}; fit the router anew")
    kind, experts = config.get("router"), config.get("experts")
    if kind not in names.available(ROUTERS):
        raise CheckpointError(f"{path}: router: {kind!r} is no router (known: {', '.join(names.available(ROUTERS))})")
    named = isinstance(experts, list) and all(isinstance(name, str) for name in experts)
    if not named or not experts or len(set(experts)) < len(experts):
        raise CheckpointError(f"{path}: experts: expected a list of different names, got {experts!r}")
    if not isinstance(config.get("domains", {}), dict):
        raise CheckpointError(f"{path}: domains: expected a block, got {config['domains']!r}")
    return config


def _block(path: Path, config: Mapping[str, Any], name: str, model: type[specs.T]) -> specs.T:
    """Read one block of `router.json`."""
    block = config.get(name)
    if not isinstance(block, dict):
        raise CheckpointError(f"{path}: {name}: expected a block, got {block!r}")
    try:
        found = specs.validate(block, model, name=name)
    except SpecError as error:
        raise CheckpointError(f"{path}: {error}") from None
    problems = check_policy(found, config["experts"]) if isinstance(found, PolicySpec) else []
    if problems:
        raise CheckpointError(f"{path}: {problems[0]}")
    return found


def _read_arrays(folder: Path) -> dict[str, NDArray[np.float32]]:
    arrays: dict[str, NDArray[np.float32]] = {}
    with open_checkpoint(folder / WEIGHTS) as weights:
        for name, info in weights.tensors.items():
            arrays[name] = np.empty(info.shape, np.float32)
            weights.read(name, 0, info.count, arrays[name].reshape(-1))
    return arrays
