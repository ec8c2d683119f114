"""Adapters that come and go while the server runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from toolkit.errors import RequestError, ToolkitError
from toolkit.serving.adapters.pool import AdapterInfo, check_name
from toolkit.serving.http.errors import ApiError, of_request
from toolkit.serving.http.fields import Body
from toolkit.serving.http.responses import (
    BODY_ERRORS,
    AdapterEntry,
    AdapterList,
    DeletedAdapter,
    LoadedAdapter,
    errors,
)
from toolkit.serving.http.roots import Roots
from toolkit.serving.loop import EngineLoop


class AdapterBody(Body):
    """Body of `POST /v1/adapters`."""

    name: str
    path: str | None = None


class LoadBody(Body):
    """Body of vLLM's `POST /v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(Body):
    """Body of vLLM's `POST /v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = None


class Adapters:
    """Loads and unloads adapters at the request of clients.

    Args:
        loop: the engine.
        roots: where clients' paths may lead.
    """

    def __init__(self, loop: EngineLoop, roots: Roots) -> None:
        self.loop, self.roots = loop, roots
        self._own = {name: info.source for name, info in loop.engine.adapters.infos.items()}
        """Sources that whoever started the server chose; they may be outside of the roots."""

    @property
    def infos(self) -> dict[str, AdapterInfo]:
        """What is loaded."""
        return self.loop.engine.adapters.infos

    def info(self, name: str) -> AdapterInfo:
        """Return what is known of an adapter.

        Raises:
            ApiError: no such adapter.
        """
        if name not in self.infos:
            raise ApiError(404, f"no adapter {name!r} (loaded: {', '.join(self.infos) or 'none'})", "model_not_found")
        return self.infos[name]

    async def load(self, name: str, path: str | None) -> tuple[AdapterInfo, str]:
        """Load an adapter; one of a name that is taken replaces it for the requests to come.

        Args:
            name: that requests ask for.
            path: of its folder; by default the one it came from, which is read anew.

        Returns:
            What is loaded, and `loaded`, `reloaded` or `unchanged`.

        Raises:
            ApiError: the name or the path cannot be used, or the adapter cannot be served.
        """
        source = await asyncio.to_thread(self._source, name, path)
        before = self.infos.get(name)
        try:
            check_name(name)
            # Answers go on while its files are read.
            opened = await asyncio.to_thread(self.loop.engine.open_adapter, source)
            info = await asyncio.wrap_future(self.loop.call(lambda engine: engine.add_adapter(name, source, opened)))
        except RequestError as error:
            raise of_request(error) from None
        except ToolkitError as error:
            raise ApiError(400, str(error), "adapter_not_usable") from None
        if before is None:
            return info, "loaded"
        return info, "unchanged" if before.key == info.key else "reloaded"

    def _source(self, name: str, path: str | None) -> str | Path:
        if path is not None:
            return self.roots.resolve(path)
        source = self.info(name).source
        return source if self._own.get(name) == source else self.roots.resolve(source)

    async def unload(self, name: str) -> None:
        """Forget an adapter; requests under way finish with it.

        Raises:
            ApiError: no such adapter, or one that the router needs.
        """
        self.info(name)
        router = self.loop.engine.router
        if router is not None and name in router.experts:
            raise ApiError(409, f"the router chooses among {', '.join(router.experts)}, so {name} stays", "in_use")
        try:
            await asyncio.wrap_future(self.loop.call(lambda engine: engine.remove_adapter(name)))
        except RequestError as error:
            raise of_request(error) from None


def entry(info: AdapterInfo) -> dict[str, Any]:
    """Return an adapter as a response shows it."""
    return {
        "id": info.name,
        "object": "adapter",
        "version": info.key,
        "path": info.source,
        "description": info.description,
        "base": info.base,
        "bytes": info.nbytes,
        "pages": info.pages,
    }


_LOADED: dict[int | str, dict[str, Any]] = {
    200: {"model": LoadedAdapter, "description": "Reloaded, or unchanged."},
    201: {"model": LoadedAdapter, "description": "Loaded."},
    **errors(403, 404, *BODY_ERRORS),
}


def adapter_routes(adapters: Adapters) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["adapters"])

    @routes.get("/v1/adapters", responses={200: {"model": AdapterList}, **errors(401)})
    async def list_adapters() -> Any:
        return {"object": "list", "data": [entry(info) for info in adapters.infos.values()]}

    @routes.get("/v1/adapters/{name}", responses={200: {"model": AdapterEntry}, **errors(401, 404)})
    async def show_adapter(name: str) -> Any:
        return entry(adapters.info(name))

    @routes.post("/v1/adapters", responses=_LOADED)
    async def load_adapter(body: AdapterBody) -> Response:
        info, what = await adapters.load(body.name, body.path)
        return JSONResponse(entry(info) | {"status": what}, 201 if what == "loaded" else 200)

    @routes.delete("/v1/adapters/{name}", responses={200: {"model": DeletedAdapter}, **errors(401, 404, 409, 500)})
    async def unload_adapter(name: str) -> Any:
        await adapters.unload(name)
        return {"id": name, "object": "adapter", "deleted": True}

    @routes.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=errors(403, 404, *BODY_ERRORS))
    async def load_lora_adapter(body: LoadBody) -> Response:
        if body.lora_name in adapters.infos and not body.load_inplace:
            message = f"adapter {body.lora_name!r} is loaded already; set load_inplace to replace it"
            raise ApiError(400, message, "adapter_exists")
        await adapters.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=errors(404, 409, *BODY_ERRORS))
    async def unload_lora_adapter(body: UnloadBody) -> Response:
        await adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return routes
