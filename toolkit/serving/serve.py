"""Start a server: from a spec until it is stopped, or in the background for the length of a block."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit import specs
from toolkit.errors import OutputError, SpecError, UnsupportedError
from toolkit.serving.engine import Engine
from toolkit.serving.spec import ServeSpec
from toolkit.tables import Table, human_bytes

BACKLOG = 2048
"""Connections that wait to be accepted, such as while the model loads."""


def serve(
    spec: specs.Source | ServeSpec,
    *,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    smoke: bool = False,
    ray: bool = False,
    quiet: bool = False,
) -> None:
    """Serve what a spec describes over HTTP until the process is told to stop.

    Args:
        spec: a YAML file, a dict or a `ServeSpec`.
        overrides: `key.path=value` changes to the spec.
        options: values that take precedence over the spec's own.
        smoke: apply the spec's own `smoke:` block.
        ray: by replicas on Ray Serve, also where the spec has no `ray:` block.
        quiet: do not print what is served.

    Raises:
        SpecError: the spec is wrong.
        OutputError: the port is taken.
    """
    loaded = specs.load(spec, ServeSpec, overrides=overrides, options=options, smoke=smoke)
    if ray or loaded.ray is not None:
        from toolkit.serving.replicas.ray_serve import serve_replicas

        serve_replicas(loaded, quiet=quiet)
        return
    listener = _listen(loaded.host, loaded.port)
    try:
        with open_engine(loaded) as engine:
            if not quiet:
                _announce(engine, loaded, listener)
            log_lines(quiet)
            options = {"log_config": None, "timeout_graceful_shutdown": loaded.drain_seconds}
            _server(engine, access_of(loaded), **options).run(sockets=[listener])
    finally:
        listener.close()


def open_engine(spec: ServeSpec) -> Engine:
    """Load the engine of a spec."""
    try:
        return Engine(
            spec.model,
            spec.adapters,
            spec.router,
            token_routers=spec.token_routers,
            limits=spec.limits,
            device=spec.device,
            dtype=spec.dtype,
            trust_remote_code=spec.trust_remote_code,
        )
    except SpecError as error:
        if error.source:
            raise  # of another file
        raise spec.error(error.problems) from None


def access_of(spec: ServeSpec) -> dict[str, Any]:
    """Return who may ask a server of a spec for what, as `serving.server.Access` has it."""
    return {
        "api_keys": spec.api_key,
        "adapter_roots": spec.adapter_roots,
        "max_waiting": spec.limits.max_waiting,
        "max_body": spec.limits.max_body,
        "requests_per_minute": spec.limits.requests_per_minute,
        "router_seconds": spec.router_seconds,
        "adapter_folders": spec.adapter_folders,
        "adapter_seconds": spec.adapter_seconds,
        "fine_tuning": spec.fine_tuning,
    }


def log_lines(quiet: bool) -> None:
    """Write the log to standard error, one JSON object a line; quietly, only what went wrong."""
    from toolkit.serving.http.records import JsonLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("toolkit.serving", logging.WARNING if quiet else logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


@contextlib.contextmanager
def background_server(
    engine: Engine, *, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None, **access: Any
) -> Iterator[str]:
    """Serve an engine in the background; yields the address, such as `http://127.0.0.1:41573`.

    Args:
        engine: touched by nobody else inside the block.
        host: to listen on.
        port: to listen on; 0 takes a free one.
        api_key: that requests must carry.
        access: other fields of `serving.server.Access`, such as `adapter_roots`.
    """
    listener = _listen(host, port)
    keys = {"api_keys": [api_key]} if api_key else {}
    server = _server(engine, keys | access, log_level="warning", timeout_graceful_shutdown=10)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise OutputError("the server did not start; see its log")
            time.sleep(0.01)
        yield f"http://{_address(host, listener.getsockname()[1])}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _server(engine: Engine, access: Mapping[str, Any], **options: Any) -> Any:
    try:
        import uvicorn

        from toolkit.serving.server import Access, build_app
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"serving needs {error.name}: pip install 'composition-toolkit[serve]'") from None
    # The middleware writes a line for each request, with its id; uvicorn's own has none.
    return uvicorn.Server(uvicorn.Config(build_app(engine, Access(**access)), access_log=False, **options))


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Two sockets may be bound to a port, but only one can listen; so the second server learns it before it loads.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OutputError(f"cannot listen on {_address(host, port)} ({error.strerror})") from None
    return listener


def free_port(host: str) -> int:
    """Return a port that nobody listens on just now."""
    with contextlib.closing(_listen(host, 0)) as listener:
        return int(listener.getsockname()[1])


def _address(host: str, port: int) -> str:
    """Return host and port as URLs have them: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _announce(engine: Engine, spec: ServeSpec, listener: socket.socket) -> None:
    from rich.console import Console

    host, port = listener.getsockname()[:2]
    address = _address(host, port)
    console = Console(stderr=True)
    console.print(adapters_table(engine))
    memory, pool = engine.runner.memory, engine.scheduler.pool
    console.print(
        f"cache  {pool.num_pages:,} pages of {pool.page_size} tokens or {human_bytes(memory.page_bytes)} of an adapter,"
        f" {human_bytes(memory.nbytes)} in all"
    )
    console.print(f"listening on http://{address}/v1 (stop with Ctrl-C)", highlight=False, markup=False)
    for warning in _warnings(engine, spec, host, address):
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)


def _warnings(engine: Engine, spec: ServeSpec, host: str, address: str) -> Iterator[str]:
    for info in engine.adapters.infos.values():
        if info.base and not same_base(info.base, engine.source):
            yield f"adapter {info.name} was trained on {info.base}, but {engine.source} is served"
    if not spec.api_key and host not in ("127.0.0.1", "::1"):
        yield f"anyone who reaches {address} is served; set an API key"


def same_base(one: str, other: str) -> bool:
    """Tell whether two names may mean the same base: the same place, or, where one is not on this disk, the same
    last part, for a model keeps its name when it is downloaded or moved."""
    paths = Path(one).expanduser(), Path(other).expanduser()
    both_ids = all(name.count("/") == 1 and not path.exists() for name, path in zip((one, other), paths, strict=True))
    if one == other or both_ids:
        return one == other
    if all(path.exists() for path in paths):
        return paths[0].samefile(paths[1])
    return paths[0].name == paths[1].name


def adapters_table(engine: Engine) -> Table:
    """Return one row per model that requests can ask for."""
    what: Mapping[str, Any] = engine.adapters.infos
    rows: list[list[Any]] = [["base", str(engine.source), type(engine.model).__name__, None]]
    rows += [[i.name, i.source, i.description, human_bytes(i.nbytes)] for i in what.values()]
    rows += [[name, "", router.describe(), None] for name, router in engine.adapters.token_routers.routers.items()]
    if engine.router:
        rows.append(["auto", "", f"{engine.router.kind} router over {len(engine.router.experts)} experts", None])
    return Table(("model", "from", "what", "size"), rows, "serving")
