"""Fit a router as a spec says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from scipy import sparse

from toolkit import specs
from toolkit.checkpoints.writer import check_free
from toolkit.errors import DataError, Problem, SpecError, UnsupportedError
from toolkit.routing import drift, scope
from toolkit.routing.embedding import Embedder
from toolkit.routing.examples import Examples, read_labelled, read_outcomes
from toolkit.routing.features import Features
from toolkit.routing.ops import Vectors
from toolkit.routing.policy import check_policy
from toolkit.routing.router import Router, kind_module
from toolkit.routing.spec import FeaturesSpec, RouteSpec


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
        DataError: a row without a prompt or a score.
        OutputError: `out` exists.
    """
    loaded = specs.load(spec, RouteSpec, overrides=overrides, smoke=smoke)
    folder = out or loaded.out
    if folder:
        check_free(Path(folder), overwrite=overwrite)
    try:
        module = kind_module(loaded.router)
        params = parameters(module, loaded.parameters)
    except (UnsupportedError, SpecError) as error:
        problems = error.problems if isinstance(error, SpecError) else [Problem("router", str(error))]
        raise loaded.error(problems) from None
    examples = read_outcomes(loaded.outcomes) if loaded.outcomes else read_labelled(loaded.experts or {})
    problems = check_policy(loaded.policy, examples.experts)
    if problems:
        raise loaded.error(problems)
    seen = {name: getattr(loaded, name) for name in FeaturesSpec.model_fields}
    features = Features(FeaturesSpec(**seen), embedder=embedder)
    vectors = features.fit(examples.prompts, quiet=quiet)
    router = fitted(loaded.router, params, features, vectors, examples)
    router.histograms = _histograms(module, params, features, vectors, examples, loaded.folds)
    policy = loaded.policy
    if loaded.scope is not None:
        router.references, distance = scope.fit(vectors, loaded.scope)
        policy = policy.model_copy(update={"max_novelty": distance})
    router.policy = policy
    if folder:
        router.save(folder, overwrite=overwrite)
    return router


def fitted(kind: str, params: Any, features: Features, vectors: Any, examples: Examples) -> Router:
    """Fit one kind of router on vectors that the features gave.

    Raises:
        SpecError: the vectors are sparse, and the kind takes none.
    """
    state = fit_state(kind_module(kind), params, vectors, examples)
    domains = {} if examples.labelled else examples.category_means()
    return Router(kind, examples.experts, state, features, domains=domains)


def fit_state(module: ModuleType, params: Any, vectors: Any, examples: Examples) -> Mapping[str, Any]:
    """Fit a module of a router.

    Raises:
        SpecError: the vectors are sparse, and the kind takes none.
    """
    if sparse.issparse(vectors) and not getattr(module, "SPARSE", False):
        kind = module.__name__.rpartition(".")[2]
        raise SpecError([Problem("words.dimensions", f"{kind} takes no sparse vectors; keep some dimensions, as 256")])
    return module.fit(vectors, examples, params)


def parameters(module: ModuleType, given: Mapping[str, Any], where: str = "parameters") -> Any:
    """Return the checked parameters of a kind of router.

    Raises:
        SpecError: with the key paths under `where`.
    """
    try:
        return specs.validate(dict(given), module.Params)
    except SpecError as error:
        found = [Problem(f"{where}.{p.where}" if p.where else where, p.message) for p in error.problems]
        raise SpecError(found) from None


def _histograms(
    module: ModuleType, params: Any, features: Features, vectors: Any, examples: Examples, folds: int
) -> dict[str, Vectors]:
    """Return how scores of new prompts are distributed, by fits that leave a part of them out; nothing of too few."""
    if folds < 2 or len(examples) < drift.FEWEST:
        return {}
    order, found = np.random.default_rng(0).permutation(len(examples)), []
    for out in np.array_split(order, folds):
        again, known = _embedded_already(features, vectors, examples), examples.take(np.setdiff1d(order, out))
        try:
            state = fit_state(module, params, again.fit(known.prompts, quiet=True), known)
        except DataError:  # an expert has too few prompts to do without some
            return {}
        found.append(module.score(again(examples.take(out).prompts), state))
        if sum(map(len, found)) >= drift.ENOUGH:
            break
    return drift.fit(np.concatenate(found))


def _embedded_already(features: Features, vectors: Any, examples: Examples) -> Features:
    """Return features to be fitted anew on some of the prompts, which embed none of them again."""
    if features.spec.embedding is None:
        return Features(features.spec)
    # The vectors begin with the embedding, centred and scaled; the new fit does both again, so nothing comes of it.
    own = vectors[:, : features.state["embedding.mean"].size]
    own = own.toarray() if sparse.issparse(own) else own
    places = {text: at for at, text in enumerate(examples.prompts)}
    return Features(features.spec, embedder=lambda texts: own[[places[text] for text in texts]])
