"""Jobs of fine-tuning, in OpenAI's shape."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field

from toolkit.errors import MissingError, RequestError
from toolkit.serving.finetuning.job import Job
from toolkit.serving.http.errors import ApiError, of_request
from toolkit.serving.http.fields import Body, only
from toolkit.serving.http.responses import (
    BODY_ERRORS,
    FineTuningCheckpoints,
    FineTuningEvents,
    FineTuningJob,
    FineTuningJobs,
    errors,
)
from toolkit.serving.http.writer import Limit, page_of
from toolkit.serving.mix import BASE

if TYPE_CHECKING:
    from toolkit.serving.finetuning.jobs import Jobs

Epochs = Annotated[int, Field(ge=1, le=1000)]
BatchSize = Annotated[int, Field(ge=1, le=4096)]
Multiplier = Annotated[float, Field(gt=0, le=1e6)]


class Hyperparameters(Body):
    """What a job may choose; `auto` leaves it to the server."""

    n_epochs: Epochs | Literal["auto"] = "auto"
    batch_size: BatchSize | Literal["auto"] = "auto"
    learning_rate_multiplier: Multiplier | Literal["auto"] = "auto"

    @property
    def chosen(self) -> dict[str, float]:
        """Return what was chosen."""
        return {name: value for name, value in self if value != "auto"}


class Supervised(Body):
    """Of the method of this name."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Body):
    """The one method that there is."""

    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class JobBody(Body):
    """Body of `POST /v1/fine_tuning/jobs`."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    integrations: Annotated[list[Any] | None, only()] = None


def shown(job: Job) -> dict[str, Any]:
    """Return a job as a response shows it."""
    chosen: Mapping[str, Any] = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    hyperparameters = {**chosen, **job.hyperparameters}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "error": None if job.error is None else {"code": "training_failed", "message": job.error, "param": None},
        "fine_tuned_model": job.name if job.status == "succeeded" else None,
        "finished_at": job.finished_at,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "model": BASE,
        "organization_id": "",
        "result_files": [],
        "seed": job.seed,
        "status": job.status,
        "trained_tokens": job.trained_tokens,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "metadata": job.metadata,
        "integrations": [],
    }


def events(jobs: Jobs, job: Job) -> list[dict[str, Any]]:
    """Return what happened to a job, the latest first."""
    found = [_event(job, number, *line) for number, line in enumerate(_lines(jobs, job))]
    return found[::-1]


def _event(job: Job, number: int, at: int, level: str, message: str, data: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "id": f"ftevent-{job.id.removeprefix('ftjob-')}-{number}",
        "object": "fine_tuning.job.event",
        "created_at": at,
        "level": level,
        "message": message,
        "type": "message" if data is None else "metrics",
        "data": data,
    }


def _lines(jobs: Jobs, job: Job) -> Iterator[tuple[int, str, str, Mapping[str, Any] | None]]:
    yield job.created_at, "info", f"created: {job.name} is to be trained on {job.training_file}", None
    if job.started_at is not None:
        yield job.started_at, "info", "the training has begun", None
        for entry in jobs.metrics(job):
            losses = {name: entry[key] for name, key in _LOSSES.items() if key in entry}
            if losses:
                told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in losses.items())
                yield job.started_at, "info", f"step {entry['step']}: {told}", {"step": entry["step"], **losses}
    if job.finished_at is not None:
        told = {"succeeded": f"succeeded: {job.name} is served", "failed": f"failed: {job.error}"}
        level = "error" if job.status == "failed" else "info"
        yield job.finished_at, level, told.get(job.status, job.status), None


_LOSSES = {"train_loss": "loss", "valid_loss": "eval_loss"}
"""OpenAI's names of what a run logs."""


def fine_tuning_routes(jobs: Jobs) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["fine-tuning"])

    def found(job_id: str) -> Job:
        try:
            return jobs.get(job_id)
        except RequestError as error:
            raise of_request(error) from None

    @routes.post("/v1/fine_tuning/jobs", responses={200: {"model": FineTuningJob}, **errors(404, *BODY_ERRORS)})
    async def create(body: JobBody) -> Any:
        chosen = body.method.supervised.hyperparameters if body.method else body.hyperparameters
        options: dict[str, Any] = {"hyperparameters": chosen.chosen if chosen else {}, "metadata": body.metadata}
        options |= {"suffix": body.suffix, "seed": body.seed}
        try:
            job = await asyncio.to_thread(jobs.create, body.model, body.training_file, body.validation_file, **options)
        except RequestError as error:
            raise of_request(error) from None
        except MissingError as error:
            raise ApiError(404, str(error), "file_not_found") from None
        return shown(job)

    @routes.get("/v1/fine_tuning/jobs", responses={200: {"model": FineTuningJobs}, **errors(400, 401)})
    async def list_jobs(after: str | None = None, limit: Limit = 20) -> Any:
        return page_of([shown(job) for job in jobs.all()], after, limit)

    @routes.get("/v1/fine_tuning/jobs/{job_id}", responses={200: {"model": FineTuningJob}, **errors(401, 404)})
    async def show(job_id: str) -> Any:
        return shown(found(job_id))

    cancelled = {200: {"model": FineTuningJob}, **errors(400, 401, 404, 429)}

    @routes.post("/v1/fine_tuning/jobs/{job_id}/cancel", responses=cancelled)
    async def cancel(job_id: str) -> Any:
        try:
            return shown(await asyncio.to_thread(jobs.cancel, job_id))
        except RequestError as error:
            raise of_request(error) from None

    happened = {200: {"model": FineTuningEvents}, **errors(400, 401, 404)}

    @routes.get("/v1/fine_tuning/jobs/{job_id}/events", responses=happened)
    async def list_events(job_id: str, after: str | None = None, limit: Limit = 20) -> Any:
        return page_of(events(jobs, found(job_id)), after, limit)

    kept = {200: {"model": FineTuningCheckpoints}, **errors(400, 401, 404)}

    @routes.get("/v1/fine_tuning/jobs/{job_id}/checkpoints", responses=kept)
    async def list_checkpoints(job_id: str, after: str | None = None, limit: Limit = 10) -> Any:
        found(job_id)
        return page_of([], after, limit)  # only finished adapters are served

    return routes
