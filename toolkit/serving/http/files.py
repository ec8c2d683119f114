"""Files of rows, in OpenAI's shape."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, UploadFile
from fastapi.responses import FileResponse, Response

from toolkit.errors import DataError, MissingError
from toolkit.serving.finetuning.files import Files, StoredFile
from toolkit.serving.http.errors import ApiError
from toolkit.serving.http.responses import BODY_ERRORS, DeletedFile, FileEntry, FileList, errors
from toolkit.serving.http.writer import Limit, page_of


def entry(stored: StoredFile) -> dict[str, Any]:
    """Return a file as a response shows it."""
    return {
        "id": stored.id,
        "object": "file",
        "bytes": stored.nbytes,
        "created_at": stored.created_at,
        "filename": stored.filename,
        "purpose": "fine-tune",
        "status": "processed",
    }


def _found(files: Files, file_id: str) -> StoredFile:
    try:
        return files.get(file_id)
    except MissingError as error:
        raise ApiError(404, str(error), "file_not_found") from None


def file_routes(files: Files) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["files"])

    @routes.post("/v1/files", responses={200: {"model": FileEntry}, **errors(*BODY_ERRORS)})
    async def upload(file: UploadFile, purpose: Annotated[Literal["fine-tune"], Form()]) -> Any:
        content = await file.read()
        try:
            return entry(await asyncio.to_thread(files.add, file.filename or "", content))
        except DataError as error:
            raise ApiError(400, str(error), "invalid_file") from None

    @routes.get("/v1/files", responses={200: {"model": FileList}, **errors(400, 401)})
    async def list_files(after: str | None = None, limit: Limit = 10000) -> Any:
        return page_of([entry(stored) for stored in files.all()], after, limit)

    @routes.get("/v1/files/{file_id}", responses={200: {"model": FileEntry}, **errors(401, 404)})
    async def show(file_id: str) -> Any:
        return entry(_found(files, file_id))

    content = {200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}}

    @routes.get("/v1/files/{file_id}/content", response_class=Response, responses={**content, **errors(401, 404)})
    async def download(file_id: str) -> Response:
        stored = _found(files, file_id)
        return FileResponse(files.path(stored), media_type="application/octet-stream", filename=stored.filename)

    @routes.delete("/v1/files/{file_id}", responses={200: {"model": DeletedFile}, **errors(401, 404)})
    async def delete(file_id: str) -> Any:
        files.delete(_found(files, file_id).id)
        return {"id": file_id, "object": "file", "deleted": True}

    return routes
