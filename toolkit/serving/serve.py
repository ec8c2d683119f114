"""Start a server: from a spec until it is stopped, or in the background for the length of a block."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from toolkit import specs
from toolkit.errors import OutputError, UnsupportedError
from toolkit.serving.engine import Engine
from toolkit.serving.spec import ServeSpec
from toolkit.tables import Table, human_bytes


def serve(
    spec: specs.Source | ServeSpec,
    *,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    smoke: bool = False,
    quiet: bool = False,
) -> None:
    """Serve what a spec describes over HTTP until the process is told to stop.

    Args:
        spec: a YAML file, a dict or a `ServeSpec`.
        overrides: `key.path=value` changes to the spec.
        options: values that take precedence over the spec's own.
        smoke: apply the spec's own `smoke:` block.
        quiet: do not print what is served.

    Raises:
        SpecError: the spec is wrong.
        OutputError: the port is taken.
    """
    loaded = specs.load(spec, ServeSpec, overrides=overrides, options=options, smoke=smoke)
    listener = _listen(loaded.host, loaded.port)
    try:
        with open_engine(loaded) as engine:
            if not quiet:
                _announce(engine, loaded, listener)
            _server(engine, loaded.api_key).run(sockets=[listener])
    finally:
        listener.close()


def open_engine(spec: ServeSpec) -> Engine:
    """Load the engine of a spec."""
    return Engine(
        spec.model,
        spec.adapters,
        spec.router,
        limits=spec.limits,
        device=spec.device,
        dtype=spec.dtype,
        trust_remote_code=spec.trust_remote_code,
    )


@contextlib.contextmanager
def background_server(
    engine: Engine, *, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None
) -> Iterator[str]:
    """Serve an engine in the background; yields the address, such as `http://127.0.0.1:41573`."""
    listener = _listen(host, port)
    server = _server(engine, api_key)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise OutputError("the server did not start; see its log")
            time.sleep(0.01)
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _server(engine: Engine, api_key: str | None) -> Any:
    try:
        import uvicorn

        from toolkit.serving.server import build_app
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"serving needs {error.name}: pip install 'composition-toolkit[serve]'") from None
    config = uvicorn.Config(build_app(engine, api_key=api_key), log_level="warning", timeout_graceful_shutdown=10)
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OutputError(f"cannot listen on {host}:{port} ({error.strerror})") from None
    return listener


def _announce(engine: Engine, spec: ServeSpec, listener: socket.socket) -> None:
    from rich.console import Console

    host, port = listener.getsockname()[:2]
    console = Console(stderr=True)
    console.print(adapters_table(engine))
    cache, pool = engine.runner.cache, engine.scheduler.pool
    tokens = pool.num_pages * pool.page_size
    console.print(f"cache  {tokens:,} tokens in {pool.num_pages:,} pages, {human_bytes(cache.nbytes)}")
    console.print(f"listening on http://{host}:{port}/v1 (stop with Ctrl-C)", highlight=False)
    if spec.api_key is None and host not in ("127.0.0.1", "::1"):
        console.print(f"warning: anyone who reaches {host}:{port} is served; set an API key", highlight=False)


def adapters_table(engine: Engine) -> Table:
    """Return one row per model that requests can ask for."""
    what: Mapping[str, Any] = engine.adapters.infos
    rows: list[list[Any]] = [["base", str(engine.source), type(engine.model).__name__, None]]
    rows += [[i.name, i.source, i.description, human_bytes(i.nbytes)] for i in what.values()]
    if engine.router:
        rows.append(["auto", "", f"{engine.router.kind} router over {len(engine.router.experts)} experts", None])
    return Table(("model", "from", "what", "size"), rows, "serving")
