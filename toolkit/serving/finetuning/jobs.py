"""Jobs of fine-tuning, one after another, in a thread beside the engine's.

A job is an ordinary run of `toolkit.adapters.train` over the engine's own weights, whose windows wait for turns between
the engine's steps. Its adapter is served as soon as its folder is whole.
"""

from __future__ import annotations

import copy
import logging
import queue
import random
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import toolkit.adapters.trainer  # noqa: F401 - what trains, before the engine runs
from toolkit.adapters.attached import beside
from toolkit.adapters.config import faults
from toolkit.adapters.runs import METRICS
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.train import train
from toolkit.adapters.training._windows import PACE
from toolkit.checkpoints.writer import staging_path
from toolkit.errors import Problem, RequestError, SpecError, ToolkitError
from toolkit.models.load import LoadedModel
from toolkit.serving.adapters.pool import check_name
from toolkit.serving.engine import Engine
from toolkit.serving.finetuning.files import Files
from toolkit.serving.finetuning.job import Job, read_jobs, read_metrics
from toolkit.serving.finetuning.turns import StoppedError
from toolkit.serving.loading import set_attention
from toolkit.serving.loop import EngineLoop
from toolkit.serving.mix import BASE
from toolkit.serving.own_pass import ordinary_attention
from toolkit.serving.spec import FineTuning

log = logging.getLogger("toolkit.serving")


class Jobs:
    """The jobs of a server.

    Args:
        loop: of the engine, whose base is trained on.
        settings: of the server's fine-tuning.

    Attributes:
        files: that clients sent.
        adapters: folder of the finished ones.
    """

    def __init__(self, loop: EngineLoop, settings: FineTuning) -> None:
        _check(settings)
        self.loop, self.settings = loop, settings
        folder = Path(settings.folder)
        self.files, self.adapters, self._records = Files(folder / "files"), folder / "adapters", folder / "jobs"
        for made in (self.adapters, self._records):
            made.mkdir(parents=True, exist_ok=True)
        self._jobs = read_jobs(self._records)
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fine-tuning", daemon=True)
        loop.engine.turns.step_seconds = settings.step_seconds

    def start(self) -> None:
        """Serve what was made before, take up what was not finished, and wait for more; once the engine's loop runs."""
        for job in list(self._jobs.values()):
            if job.status == "succeeded" and (self.adapters / job.name).is_dir():
                try:
                    self._publish(job)
                except ToolkitError as error:  # its folder was changed, or another adapter has its name
                    log.warning("an adapter is not served", extra={"fields": {"job": job.id, "reason": str(error)}})
            elif not job.has_ended:
                job.status = "queued"
                self._queue.put(job)
        self._thread.start()

    def stop(self) -> None:
        """End the job under way, which begins anew with the next start; before the engine's loop stops."""
        with self._lock:  # so that no job begins between the two
            self._stopping = True
            self.loop.engine.turns.stop()
        self._queue.put(None)
        self._thread.join()

    def all(self) -> list[Job]:
        """Return all jobs, the newest first."""
        return list(reversed(self._jobs.values()))

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            RequestError: no such job.
        """
        if job_id not in self._jobs:
            raise RequestError(f"no fine-tuning job {job_id!r}", "job_not_found")
        return self._jobs[job_id]

    def create(
        self,
        model: str,
        training_file: str,
        validation_file: str | None = None,
        *,
        suffix: str | None = None,
        seed: int | None = None,
        hyperparameters: Mapping[str, float] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Job:
        """Queue a job.

        Args:
            model: `base`, or what the server calls its base.
            training_file: id of the rows.
            validation_file: id of others, on which the loss is measured.
            suffix: name of the adapter; by default the job's own.
            seed: of the run.
            hyperparameters: `n_epochs`, `batch_size`, `learning_rate_multiplier`; the server's own for what is missing.
            metadata: the client's own.

        Raises:
            RequestError: an unknown model, or a name that cannot be used.
            MissingError: no such file.
        """
        engine = self.loop.engine
        if model not in (BASE, engine.source):
            raise RequestError(f"only {BASE} can be fine-tuned here, not {model!r}", "model_not_found")
        for file_id in filter(None, (training_file, validation_file)):
            self.files.get(file_id)
        job_id = f"ftjob-{secrets.token_hex(12)}"
        name = suffix or f"ft-{job_id[-8:]}"
        check_name(name)
        with self._lock:
            if name in engine.models or any(job.name == name for job in self._jobs.values() if not job.has_ended):
                raise RequestError(f"suffix: there is a model {name!r} already")
            job = Job(
                job_id,
                int(time.time()),
                name,
                training_file,
                validation_file,
                random.SystemRandom().randrange(2**31) if seed is None else seed,
                dict(hyperparameters or {}),
                dict(metadata or {}),
            )
            job.save(self._records)
            self._jobs[job_id] = job
        self._queue.put(job)
        return job

    def cancel(self, job_id: str) -> Job:
        """End a job; one under way ends at its next window.

        Raises:
            RequestError: no such job, or one that has ended.
        """
        job = self.get(job_id)
        with self._lock:
            if job.has_ended:
                raise RequestError(f"job {job_id} has {job.status} already")
            if job.status == "running":
                self.loop.engine.turns.stop()
            self._end(job, "cancelled")
        return job

    def metrics(self, job: Job) -> list[Mapping[str, Any]]:
        """Return what a job's run has logged so far: losses by step; nothing once its folder is another job's."""
        latest = [other for other in list(self._jobs.values()) if other.name == job.name][-1]
        if latest is not job or job.status not in ("running", "succeeded"):
            return []
        out = self.adapters / job.name
        return read_metrics((staging_path(out) if job.status == "running" else out) / METRICS)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            with self._lock:
                if job.has_ended or self._stopping:  # it was cancelled while it waited
                    continue
                job.status, job.started_at = "running", int(time.time())
                job.save(self._records)
                self.loop.engine.turns.open()
            try:
                self._train(job)
            except Exception:  # such as a disk that is full, so that the job cannot even be noted as failed
                log.exception("fine-tuning job %s was lost", job.id)
            finally:
                self.loop.engine.turns.close()

    def _train(self, job: Job) -> None:
        """Run a job to its end, whatever that is."""
        turns = self.loop.engine.turns
        before = turns.tokens
        try:
            self.loop.call(lambda engine: None)  # an engine that sleeps has to look whether there are turns to give
            spec = self._spec(job)
            token = PACE.set(turns)
            try:
                train(spec, self.adapters / job.name, overwrite=True, quiet=True)
            finally:
                PACE.reset(token)
            if job.has_ended:
                return  # cancelled after its last window
            self._publish(job)
            error = None
        except StoppedError:
            return  # cancelled, or to begin anew
        except ToolkitError as found:
            error = self._told(job, str(found))
        except Exception:
            log.exception("fine-tuning job %s failed", job.id)
            error = "the training failed; see the server's log"
        with self._lock:
            if not job.has_ended:
                job.error, job.trained_tokens = error, turns.tokens - before
                self._end(job, "failed" if error else "succeeded")

    def _end(self, job: Job, status: Any) -> None:
        job.status, job.finished_at = status, int(time.time())
        job.save(self._records)
        fields = {"job": job.id, "status": status, "model": job.name, "error": job.error}
        log.info("fine-tuning job ended", extra={"fields": fields})

    def _told(self, job: Job, message: str) -> str:
        """Return a message in which files have their clients' names."""
        for stored in self.files.all():
            if stored.id in (job.training_file, job.validation_file):
                message = message.replace(str(self.files.path(stored)), stored.filename)
        return message

    def _publish(self, job: Job) -> None:
        """Serve the adapter of a job."""
        folder = self.adapters / job.name
        opened = self.loop.engine.open_adapter(folder)
        self.loop.call(lambda engine: engine.add_adapter(job.name, folder, opened)).result()

    def _spec(self, job: Job) -> dict[str, Any]:
        """Return the run of a job: the server's settings, and what the client chose."""
        settings, chosen = self.settings, job.hyperparameters
        spec = _shared(settings)
        training = spec["training"] | {"seed": job.seed}
        for name, key in (("n_epochs", "num_epochs"), ("batch_size", "batch_size")):
            training |= {key: chosen[name]} if name in chosen else {}
        rate = settings.training.learning_rate * chosen.get("learning_rate_multiplier", 1.0)
        data: dict[str, Any] = {"train": str(self.files.path(self.files.get(job.training_file)))}
        if job.validation_file:
            data["validation"] = str(self.files.path(self.files.get(job.validation_file)))
        base: LoadedModel = self.loop.call(_trainable).result()
        training |= {"learning_rate": rate}
        return spec | {"base": base, "data": data, "training": training, "device": str(base.model.device)}


def _shared(settings: FineTuning) -> dict[str, Any]:
    """Return what all runs of a server have in common."""
    training = settings.training.model_dump(exclude_unset=True, exclude={"methods"})
    return {
        "adapter": settings.adapter.model_dump(exclude_unset=True),
        "training": training | {"report_to": (), "methods": [*settings.training.methods, "token_windows"]},
    }


def _check(settings: FineTuning) -> None:
    """Refuse settings that no run could have.

    Raises:
        SpecError: what is wrong.
    """
    try:
        spec = TrainSpec.model_validate(_shared(settings) | {"base": "toolkit:base", "data": {"train": "rows.jsonl"}})
        found = faults(spec)
    except ValidationError as error:
        found = [Problem("", str(error.errors()[0]["msg"]))]
    if found:
        raise SpecError([Problem(f"fine_tuning.{fault.where}", fault.message) for fault in found])


def _trainable(engine: Engine) -> LoadedModel:
    """Return a model of modules of its own that shares the engine's weights."""
    model = beside(engine.model)
    set_attention(model, ordinary_attention(model))
    return LoadedModel(engine.source, model, copy.deepcopy(engine.tokenizer))
