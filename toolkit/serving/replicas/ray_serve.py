"""Replicas of one server on Ray Serve: started, watched, and added or removed with the load, by Ray."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from toolkit.errors import Problem, UnsupportedError
from toolkit.serving.http.errors import ID_HEADER
from toolkit.serving.replicas.asgi import Asked, Head, Part, answers
from toolkit.serving.replicas.forward import Front
from toolkit.serving.serve import access_of, free_port, log_lines, open_engine
from toolkit.serving.spec import RayServe, ServeSpec

NAME = "toolkit"
"""Of the application in Ray."""

HELD = 256
"""Models that a replica is known to have served lately, so that requests for them go there."""


class Replica:
    """One engine and its application, in a process of its own.

    Args:
        spec: of the server.
        folder: that its relative paths begin at.
    """

    def __init__(self, spec: ServeSpec, folder: str) -> None:
        from toolkit.serving.server import Access, build_app

        if Path(folder).is_dir():
            os.chdir(folder)
        log_lines(quiet=False)
        self.engine = open_engine(spec)
        self.app = build_app(self.engine, Access(**access_of(spec)))
        self._life: Any = None

    async def begin(self) -> None:
        """Start the engine's thread, once."""
        if self._life is None:
            self._life = self.app.router.lifespan_context(self.app)
            await self._life.__aenter__()

    async def answer(self, asked: Asked) -> AsyncGenerator[Part]:
        """Yield the answer to a request as it comes."""
        await self.begin()
        async for part in answers(self.app, asked):
            yield part

    async def check_health(self) -> None:
        """Fail where the engine has stopped, so that Ray starts another replica."""
        await self.begin()
        async for part in answers(self.app, Asked("GET", "/health", b"", (), b"")):
            if not isinstance(part, bytes) and part.status != 200:
                raise RuntimeError("the engine has stopped")


def bound(spec: ServeSpec, ray_spec: RayServe, serve: Any) -> Any:
    """Return Ray's application: a front, and the replicas behind it; `serve` is Ray's module of this name."""
    from fastapi import FastAPI
    from ray.exceptions import RayActorError

    from toolkit.serving.http.middleware import BodyLimit

    # The replicas' own log has a line for each request.
    quietly = {"logging_config": {"log_level": "WARNING", "enable_access_log": False}}

    @serve.deployment(name="replicas", **quietly)
    class Serving(Replica):
        @serve.multiplexed(max_num_models_per_replica=HELD)
        async def hold(self, model: str) -> str:
            return model  # that it was asked for is what Ray is to know

        async def answer(self, asked: Asked) -> AsyncGenerator[Part]:
            if model := serve.get_multiplexed_model_id():
                await self.hold(model)
            async for part in super().answer(asked):
                yield part

    def front() -> Any:
        handle = serve.get_deployment_handle("replicas", NAME)

        async def ask(model: str, asked: Asked) -> AsyncGenerator[Part]:
            parts = handle.options(stream=True, multiplexed_model_id=model).answer.remote(asked)
            try:
                async for part in parts:
                    yield _without_id(part)
            finally:
                parts.cancel()  # leaves what has ended alone

        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.mount("/", BodyLimit(Front(ask, (RayActorError,)), spec.limits.max_body))
        return app

    @serve.deployment(name="front", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0.1}, **quietly)
    @serve.ingress(front)
    class Ingress:
        def __init__(self, replicas: Any) -> None:
            """Take the handle, by which Ray knows that one needs the other."""

    limits = spec.limits
    options = {
        "max_ongoing_requests": limits.max_requests + limits.max_waiting,
        "health_check_period_s": 2,
        "autoscaling_config": {
            "min_replicas": ray_spec.min_replicas,
            "max_replicas": ray_spec.max_replicas,
            "target_ongoing_requests": ray_spec.ongoing_requests or max(1.0, limits.max_requests / 2),
        },
        "ray_actor_options": {"num_cpus": ray_spec.cpus, "num_gpus": ray_spec.num_gpus},
    }
    return Ingress.bind(Serving.options(**options).bind(spec, os.getcwd()))


def _without_id(part: Part) -> Part:
    """Leave out the id of a request, which Ray's proxy gave it and adds to its answer itself."""
    if isinstance(part, bytes):
        return part
    return Head(part.status, tuple((name, value) for name, value in part.headers if name != ID_HEADER.encode()))


def serve_replicas(spec: ServeSpec, *, quiet: bool = False) -> None:
    """Serve a spec by several replicas until the process is told to stop.

    Raises:
        SpecError: what one server can do alone.
        UnsupportedError: Ray is not installed, or not there.
    """
    ray_spec = spec.ray or RayServe()
    if spec.fine_tuning is not None:
        raise spec.error([Problem("fine_tuning", "one server trains, not several; leave it out, or ray")])
    for name in ("READY", "HEALTH"):  # 5 seconds are short on a busy machine, and Ray would start over
        os.environ.setdefault(f"RAY_SERVE_PROXY_{name}_CHECK_TIMEOUT_S", "30")
    try:
        import ray
        from ray import serve
    except ModuleNotFoundError:
        raise UnsupportedError("replicas need ray: pip install 'composition-toolkit[ray]'") from None
    port = spec.port or free_port(spec.host)
    try:
        ray.init(
            address=ray_spec.address,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=not quiet,
        )
    except ConnectionError as error:
        raise UnsupportedError(f"ray.address: {' '.join(str(error).split())}") from None
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(http_options={"host": spec.host, "port": port})
        serve.run(bound(spec, ray_spec, serve), name=NAME, route_prefix="/")
        if not quiet:
            _announce(spec, ray_spec, port)
        stopped.wait()
    finally:
        try:
            serve.shutdown()
        finally:
            ray.shutdown()  # or Ray's own processes would outlive this one


def _announce(spec: ServeSpec, ray_spec: RayServe, port: int) -> None:
    from rich.console import Console

    count = f"{ray_spec.min_replicas} to {ray_spec.max_replicas}"
    text = f"{count} replicas of {spec.model}, listening on http://{spec.host}:{port}/v1 (stop with Ctrl-C)"
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
