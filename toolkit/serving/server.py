"""The application: what is served where, and what all requests pass."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI

from toolkit.serving.adapter_watch import AdapterWatch
from toolkit.serving.engine import Engine
from toolkit.serving.http.adapters import Adapters, adapter_routes
from toolkit.serving.http.document import describe
from toolkit.serving.http.embeddings import embedding_routes
from toolkit.serving.http.errors import add_error_handlers
from toolkit.serving.http.files import file_routes
from toolkit.serving.http.fine_tuning import fine_tuning_routes
from toolkit.serving.http.generate import generate_routes
from toolkit.serving.http.limits import Queue
from toolkit.serving.http.metrics import Metrics
from toolkit.serving.http.middleware import BodyLimit, Gate, RateLimit, Recorder
from toolkit.serving.http.page import Page
from toolkit.serving.http.roots import Roots
from toolkit.serving.http.router import router_routes
from toolkit.serving.http.state import model_routes, state_routes
from toolkit.serving.http.token_texts import TokenTexts
from toolkit.serving.loop import EngineLoop
from toolkit.serving.router_watch import watch_of
from toolkit.serving.spec import FineTuning
from toolkit.serving.watching import Watch

if TYPE_CHECKING:
    from toolkit.serving.finetuning.jobs import Jobs


@dataclass(frozen=True)
class Access:
    """Who may ask for what, and how much.

    Attributes:
        api_keys: that requests must carry one of; none lets everybody in.
        adapter_roots: folders that clients may load adapters from.
        max_waiting: most answers that wait for their turn.
        max_body: bytes of a body.
        requests_per_minute: of one key; `None` for no bound.
        router_seconds: between two looks at the folder of the router, which is taken up when it changes; 0 never looks.
        adapter_folders: whose own folders are adapters, which are served, those that come later too.
        adapter_seconds: between two looks at these.
        fine_tuning: where LoRAs are trained beside requests, and how; `None` where none are.
    """

    api_keys: Sequence[str] = ()
    adapter_roots: Sequence[str | Path] = ()
    max_waiting: int = 1024
    max_body: int = 16_000_000
    requests_per_minute: int | None = None
    router_seconds: float = 2.0
    adapter_folders: Sequence[str | Path] = ()
    adapter_seconds: float = 2.0
    fine_tuning: FineTuning | None = None


def build_app(engine: Engine, access: Access | None = None) -> FastAPI:
    """Return the application; the engine runs in a thread of its own as long as the application does."""
    access = access or Access()
    loop = EngineLoop(engine)
    metrics = Metrics(engine)
    watches = _watches(loop, access)
    jobs = _jobs(loop, access.fine_tuning) if access.fine_tuning else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop.start()
        for watch in watches:
            watch.start()
        if jobs:
            await asyncio.to_thread(jobs.start)
        yield
        if jobs:
            await asyncio.to_thread(jobs.stop)
        for watch in watches:
            await asyncio.to_thread(watch.stop)
        await asyncio.to_thread(loop.stop)

    app = FastAPI(title="Composition Toolkit", version=version("composition-toolkit"), lifespan=lifespan)
    add_error_handlers(app)
    # The last that is added is the first that a request meets.
    app.add_middleware(BodyLimit, most=access.max_body)
    app.add_middleware(RateLimit, per_minute=access.requests_per_minute)
    app.add_middleware(Gate, keys=access.api_keys)
    app.add_middleware(Page)
    app.add_middleware(Recorder, metrics=metrics)
    queue = Queue(engine.scheduler.max_requests, access.max_waiting)
    # A tokenizer cannot be used by two threads at once, and the engine's is the engine's.
    texts = TokenTexts(copy.deepcopy(engine.tokenizer))
    app.include_router(generate_routes(loop, queue, texts))
    app.include_router(embedding_routes(loop, queue))
    roots = [*access.adapter_roots, *([jobs.adapters] if jobs else [])]  # what was trained here can be read anew
    app.include_router(adapter_routes(Adapters(loop, Roots(roots))))
    if jobs:
        app.include_router(file_routes(jobs.files))
        app.include_router(fine_tuning_routes(jobs))
    app.include_router(model_routes(engine))
    app.include_router(router_routes(engine))
    app.include_router(state_routes(loop, queue, metrics))
    describe(app, keyed=bool(access.api_keys))
    return app


def _jobs(loop: EngineLoop, settings: FineTuning) -> Jobs:
    # What trains is imported before the engine runs, which it would hold up for seconds, and by no other server.
    from toolkit.serving.finetuning.jobs import Jobs

    return Jobs(loop, settings)


def _watches(loop: EngineLoop, access: Access) -> list[Watch]:
    """Return what looks after the router's folder, and after those of adapters."""
    found: list[Watch] = []
    if access.adapter_folders:
        found.append(AdapterWatch(loop, access.adapter_folders, access.adapter_seconds))
    router = watch_of(loop, access.router_seconds)
    return [*found, router] if router else found
