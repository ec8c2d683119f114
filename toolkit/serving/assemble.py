"""Put an engine's parts together, and fit a router to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from toolkit.checkpoints.locate import locate
from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import MissingError, Problem, SpecError, ToolkitError
from toolkit.kernels.impl import Impl
from toolkit.routing.embedding import HiddenStates
from toolkit.routing.policy import may_fall_back
from toolkit.routing.router import Router, load_router
from toolkit.routing.token.spec import token_router_spec
from toolkit.serving import graphs
from toolkit.serving.adapters.open import open_source
from toolkit.serving.adapters.pool import AdapterPool, check_name
from toolkit.serving.adapters.target import Target
from toolkit.serving.adapters.tuned import SharedTensors
from toolkit.serving.memory import Memory, page_elements
from toolkit.serving.mix import BASE
from toolkit.serving.pages import PagePool
from toolkit.serving.preemption import SwapSpace
from toolkit.serving.prefix import PrefixCache
from toolkit.serving.runner import Runner
from toolkit.serving.scheduler import Scheduler
from toolkit.serving.sites import BatchAdapters
from toolkit.serving.spec import Limits


def longest(model: PreTrainedModel, limits: Limits) -> int:
    """Return the most tokens of prompt and answer.

    Raises:
        SpecError: the limits are more than the model takes.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = limits.max_model_len
    if known and wanted and wanted > known:
        raise SpecError([Problem("limits.max_model_len", f"the model takes at most {known} tokens, got {wanted}")])
    return wanted or known or 4096


def assemble(
    model: PreTrainedModel, limits: Limits, adapters: Mapping[str, str | Path], impl: Impl | None
) -> tuple[Runner, AdapterPool, Scheduler]:
    """Try the model, open its adapters and lay out the memory.

    Raises:
        UnsupportedError: the model, or an adapter, cannot be served.
    """
    runner = Runner(model, limits.page_size, impl)
    target, shared = Target.of(model, runner.observed), SharedTensors()
    for name in adapters:
        check_name(name)
    opened = {name: open_source(source, target, shared) for name, source in adapters.items()}
    count = limits.num_pages(longest(model, limits))
    if limits.cache_tokens is None:
        page = page_elements(runner.observed.heads, limits.page_size)[0] * model.dtype.itemsize
        count += _pages_for([source.nbytes for source in opened.values()], limits.max_requests, page)
    pages = PagePool(count, limits.page_size)
    capture = graphs.capture_for(model.device) if limits.decode_graphs and impl in (None, "triton") else None
    spare = 0 if capture is None else 1
    memory = Memory(runner.observed.heads, count + spare, limits.page_size, model.dtype, model.device)
    host = limits.host_bytes(model.device.type)
    pool = AdapterPool(target, memory, pages, BatchAdapters(impl=impl), host, shared)
    for name, source in opened.items():
        pool.add(name, adapters[name], source)
    runner.begin(memory, pool)
    if capture is not None:
        runner.graphs = graphs.DecodeGraphs(model, memory, pool.batch, pool.linear_groups, impl, capture=capture)
    scheduler = Scheduler(
        pages,
        limits.max_batch_tokens,
        limits.max_requests,
        adapters=pool,
        prefixes=PrefixCache(pages) if limits.prefix_cache else None,
        swap=SwapSpace(memory, limits.swap_bytes // memory.page_bytes) if limits.swap_bytes else None,
    )
    return runner, pool, scheduler


def add_token_routers(pool: AdapterPool, specs: Mapping[str, Any]) -> None:
    """Make the token routers over the adapters of a pool, each from its block or its folder.

    Raises:
        SpecError: one that cannot be served.
    """
    problems = []
    for name, spec in specs.items():
        try:
            check_name(name)
            if name in pool.infos:
                raise SpecError("an adapter has this name")
            pool.token_routers.add(name, token_router_spec(spec))
        except ToolkitError as error:
            problems.append(Problem(f"token_routers.{name}", str(error)))
    if problems:
        raise SpecError(problems)


def _pages_for(sizes: Sequence[int], count: int, page_bytes: int) -> int:
    """Return the pages of as many adapters as a batch can have, the largest ones."""
    return sum(-(-nbytes // page_bytes) + 1 for nbytes in sorted(sizes, reverse=True)[:count])


def served_router(
    router: Router | str | Path,
    adapters: Collection[str],
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    source: str,
) -> Router:
    """Return a router that embeds with the served model where it was fitted with it.

    Raises:
        SpecError: it chooses among experts that are not served, or falls back to what is not.
    """
    loaded = router if isinstance(router, Router) else load_router(router)
    fallback = [loaded.policy.fallback] if may_fall_back(loaded.policy) else []
    named = dict.fromkeys([*loaded.experts, *fallback])
    absent = [name for name in named if name != BASE and name not in adapters]
    if absent:
        served = ", ".join([BASE, *adapters])
        message = f"the router chooses among {', '.join(absent)}, which are not served (served: {served})"
        raise SpecError([Problem("router", message)])
    spec = loaded.embedding
    if spec is not None and same_model(spec.model, source):
        loaded.embedder = HiddenStates(model, tokenizer, spec.layer, spec.max_length, spec.prefix)
    return loaded


def same_model(model: object, source: str) -> bool:
    """Tell whether a router's embedding names the served model."""
    try:
        return isinstance(model, str) and locate(model) == locate(source)
    except MissingError:
        return False
