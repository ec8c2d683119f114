"""LoRAs are trained beside requests, exactly as elsewhere, and disturb no answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file

from toolkit.adapters.train import train
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError
from toolkit.serving.engine import Engine
from toolkit.serving.request import Sampling
from toolkit.serving.serve import background_server
from toolkit.serving.spec import FineTuning, Limits, ServeSpec

ROWS = [{"prompt": f"Sort {'cab' * n}:", "completion": f" {'abc' * n}"} for n in range(1, 13)]
TRAINING: dict[str, Any] = {"batch_size": 3, "learning_rate": 0.01, "logging_steps": 1, "num_epochs": 2}
ADAPTER: dict[str, Any] = {"method": "lora", "r": 4, "target_modules": "all-linear"}


@pytest.fixture
def engine(base, loras) -> Iterator[Engine]:
    limits = Limits(max_requests=8, page_size=4, max_batch_tokens=64)
    with Engine(str(base), {"plain": loras["plain"]}, limits=limits) as engine:
        yield engine


def settings(folder: Path, **changes: Any) -> FineTuning:
    return FineTuning.model_validate({"folder": folder, "adapter": ADAPTER, "training": TRAINING, **changes})


@pytest.fixture
def client(engine, tmp_path) -> Iterator[openai.OpenAI]:
    with background_server(engine, fine_tuning=settings(tmp_path / "ft")) as url, client_of(url) as client:
        yield client


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def upload(client: openai.OpenAI, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return client.files.create(file=(name, content), purpose="fine-tune").id


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(client: openai.OpenAI, job_id: str) -> Any:
    until(lambda: client.fine_tuning.jobs.retrieve(job_id).status not in ("queued", "running"))
    return client.fine_tuning.jobs.retrieve(job_id)


@pytest.mark.system("flexllm")
def test_a_job_is_the_plain_run_and_is_served_at_once(client, engine, base, tmp_path):
    file_id, other = upload(client, ROWS), upload(client, ROWS[:3], "validation.jsonl")
    job = client.fine_tuning.jobs.create(
        model="base",
        training_file=file_id,
        validation_file=other,
        suffix="sorter",
        seed=5,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4}}},
        metadata={"team": "letters"},
    )
    assert job.status in ("queued", "running")
    assert (job.fine_tuned_model, job.metadata) == (None, {"team": "letters"})
    job = ended(client, job.id)
    assert (job.status, job.fine_tuned_model, job.error) == ("succeeded", "sorter", None)
    assert job.finished_at is not None
    assert job.trained_tokens is not None

    write_rows(tmp_path / "rows.jsonl", ROWS)
    write_rows(tmp_path / "few.jsonl", ROWS[:3])
    spec = {
        "base": str(base),
        "adapter": ADAPTER,
        "data": {"train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / "few.jsonl")},
        "training": TRAINING | {"seed": 5, "num_epochs": 3, "batch_size": 4},
        "device": "cpu",
    }
    train(spec, tmp_path / "plain", quiet=True)
    wanted = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    found = load_file(tmp_path / "ft" / "adapters" / "sorter" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4)

    lines = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    told = {(e.data["step"], name): e.data[name] for e in events if e.type == "metrics" for name in e.data}
    for line in lines:
        for key, name in (("loss", "train_loss"), ("eval_loss", "valid_loss")):
            if key in line:
                assert told[line["step"], name] == pytest.approx(line[key], rel=1e-4)
    assert events[0].message == "succeeded: sorter is served"
    assert events[-1].message.startswith("created: sorter")

    answer = client.completions.create(model="sorter", prompt="Sort cab:", max_tokens=8, temperature=0)
    with Engine(str(base), {"own": tmp_path / "plain"}) as plain:
        (own,) = plain.generate(["Sort cab:"], "own", Sampling(max_tokens=8, temperature=0))
    assert answer.choices[0].text == own.text
    assert [model.id for model in client.models.list()] == ["base", "plain", "sorter"]


@pytest.mark.system("flexllm")
def test_answers_beside_a_run_are_those_without_one_to_the_bit(client, engine):
    def scores() -> list[Any]:
        found = []
        for model in ("base", "plain", "plain:0.5"):
            answer = client.completions.create(
                model=model, prompt="Once upon a time", max_tokens=24, temperature=0, logprobs=3,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            found.append((answer.choices[0].text, answer.choices[0].logprobs.token_logprobs))
        return found

    scores()  # so that prompts are in the cache, every time from here on
    alone = scores()
    job = client.fine_tuning.jobs.create(
        model="base", training_file=upload(client, ROWS), suffix="new", hyperparameters={"n_epochs": 200}
    )
    until(lambda: engine.turns.tokens > 50)
    before = engine.turns.tokens
    beside = scores()
    assert engine.turns.tokens > before, "the training went on meanwhile"
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    assert beside == alone
    assert "new" not in [model.id for model in client.models.list()]
    client.fine_tuning.jobs.cancel(job.id)
    until(lambda: not engine.turns.is_open)
    assert scores() == alone, "and nothing of it is left in the base"


def test_a_job_is_cancelled_while_it_waits_and_while_it_runs(client, engine, tmp_path):
    file_id = upload(client, ROWS)
    first = client.fine_tuning.jobs.create(
        model="base", training_file=file_id, suffix="one", hyperparameters={"n_epochs": 500}
    )
    second = client.fine_tuning.jobs.create(model="base", training_file=file_id, suffix="two")
    until(lambda: client.fine_tuning.jobs.retrieve(first.id).status == "running")
    until(lambda: engine.turns.tokens > 0)
    assert client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(first.id).status == "cancelled"
    until(lambda: not engine.turns.is_open)
    with pytest.raises(openai.BadRequestError, match="has cancelled already"):
        client.fine_tuning.jobs.cancel(first.id)
    assert list((tmp_path / "ft" / "adapters").iterdir()) == [], "nothing is left of it"
    third = client.fine_tuning.jobs.create(model="base", training_file=file_id, suffix="one")
    assert ended(client, third.id).status == "succeeded"
    assert [job.id for job in client.fine_tuning.jobs.list()] == [third.id, second.id, first.id]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1, after=third.id).data] == [second.id]


def test_bad_rows_fail_the_job_with_their_place_under_the_name_that_the_client_gave(client):
    rows = [*ROWS[:2], {"prompt": "no completion"}]
    job = client.fine_tuning.jobs.create(model="base", training_file=upload(client, rows, "my rows.jsonl"), suffix="x")
    job = ended(client, job.id)
    assert job.status == "failed"
    assert job.error.message.startswith("my rows.jsonl:3:")
    assert "ft/files" not in job.error.message
    event = client.fine_tuning.jobs.list_events(job.id).data[0]
    assert (event.level, event.message) == ("error", f"failed: {job.error.message}")


def test_a_file_that_goes_while_its_job_waits_fails_the_job(client):
    first = client.fine_tuning.jobs.create(
        model="base", training_file=upload(client, ROWS), suffix="one", hyperparameters={"n_epochs": 500}
    )
    file_id = upload(client, ROWS)
    second = client.fine_tuning.jobs.create(model="base", training_file=file_id, suffix="two")
    client.files.delete(file_id)
    client.fine_tuning.jobs.cancel(first.id)
    job = ended(client, second.id)
    assert (job.status, job.error.message) == ("failed", f"no file '{file_id}'")


def test_requests_that_cannot_be_met(client):
    file_id = upload(client, ROWS)
    create = client.fine_tuning.jobs.create
    for error, message, body in (
        (openai.NotFoundError, "only base can be fine-tuned", {"model": "plain", "training_file": file_id}),
        (openai.NotFoundError, "no file 'file-x'", {"model": "base", "training_file": "file-x"}),
        (openai.NotFoundError, "no file", {"model": "base", "training_file": "../rows"}),
        (openai.BadRequestError, "a model 'plain' already", {"training_file": file_id, "suffix": "plain"}),
        (openai.BadRequestError, "adapter name 'a:b'", {"training_file": file_id, "suffix": "a:b"}),
        (openai.BadRequestError, "n_epochs", {"training_file": file_id, "hyperparameters": {"n_epochs": 0}}),
        (openai.BadRequestError, "beta: not supported", {"training_file": file_id, "hyperparameters": {"beta": 1}}),
        (openai.BadRequestError, "method.type", {"training_file": file_id, "method": {"type": "dpo"}}),
    ):
        with pytest.raises(error, match=message):
            create(**{"model": "base", **body})
    with pytest.raises(openai.NotFoundError, match="no fine-tuning job"):
        client.fine_tuning.jobs.retrieve("ftjob-none")
    with pytest.raises(openai.BadRequestError, match="whose name ends in"):
        upload(client, ROWS, "rows.txt")
    with pytest.raises(openai.BadRequestError, match="is empty"):
        upload(client, [])


def test_files_come_and_go(client):
    content = b'{"prompt": "a", "completion": "b"}\n'
    sent = client.files.create(file=("a.jsonl", content), purpose="fine-tune")
    other = client.files.create(file=("b.jsonl", content * 2), purpose="fine-tune")
    assert (sent.bytes, sent.filename, sent.status) == (len(content), "a.jsonl", "processed")
    assert client.files.content(sent.id).read() == content
    assert client.files.retrieve(other.id) == other
    assert {file.id for file in client.files.list()} == {sent.id, other.id}
    assert client.files.delete(sent.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(sent.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(sent.id)


def test_a_server_that_starts_anew_goes_on_with_its_jobs_and_serves_what_they_made(base, tmp_path):
    limits = Limits(page_size=4)
    given = settings(tmp_path / "ft", training=TRAINING | {"num_epochs": 1})

    def server(stack: ExitStack) -> tuple[Engine, openai.OpenAI]:
        engine = stack.enter_context(Engine(str(base), limits=limits))
        url = stack.enter_context(background_server(engine, fine_tuning=given))
        return engine, stack.enter_context(client_of(url))

    with ExitStack() as stack:
        engine, client = server(stack)
        file_id = upload(client, ROWS)
        done = ended(client, client.fine_tuning.jobs.create(model="base", training_file=file_id, suffix="one").id)
        long = client.fine_tuning.jobs.create(
            model="base", training_file=file_id, suffix="two", hyperparameters={"n_epochs": 20}
        )
        until(lambda: client.fine_tuning.jobs.retrieve(long.id).status == "running")
    assert not engine.turns.is_open
    with ExitStack() as stack:
        _, client = server(stack)
        assert client.fine_tuning.jobs.retrieve(done.id).status == "succeeded"
        client.completions.create(model="one", prompt="Sort cab:", max_tokens=2)
        assert ended(client, long.id).status == "succeeded"
        client.completions.create(model="two", prompt="Sort cab:", max_tokens=2)


@pytest.mark.system("flexllm")
def test_a_request_sees_old_weights_or_new_ones_and_never_a_mixture(client, engine):
    """While an adapter is trained anew under a name that is free again, answers are all of one version."""
    file_id = upload(client, ROWS)
    first = client.fine_tuning.jobs.create(model="base", training_file=file_id, suffix="twice")
    ended(client, first.id)
    ask = {"model": "twice", "prompt": "Sort cab:", "max_tokens": 12, "temperature": 0, "logprobs": 1}
    ask |= {"extra_body": {"ignore_eos": True}}
    old = client.completions.create(**ask).choices[0].logprobs.token_logprobs
    httpx.delete(f"{client.base_url}adapters/twice", trust_env=False).raise_for_status()
    second = client.fine_tuning.jobs.create(
        model="base", training_file=file_id, suffix="twice", hyperparameters={"learning_rate_multiplier": 3}
    )
    seen: list[list[float]] = []
    stop = threading.Event()

    def go_on_asking() -> None:
        while not stop.is_set():
            with suppress(openai.NotFoundError):  # between the two there is none
                seen.append(client.completions.create(**ask).choices[0].logprobs.token_logprobs)

    asker = threading.Thread(target=go_on_asking)
    asker.start()
    ended(client, second.id)
    until(lambda: len(seen) > 2)
    stop.set()
    asker.join()
    kinds = [[e.type for e in client.fine_tuning.jobs.list_events(job.id, limit=100)] for job in (first, second)]
    assert ["metrics" in of_job for of_job in kinds] == [False, True], "no job shows the losses of another"
    new = client.completions.create(**ask).choices[0].logprobs.token_logprobs
    assert max(abs(a - b) for a, b in zip(new, old, strict=True)) > 0.01
    # The first that computes the prompt rounds otherwise than those that find it in the cache.
    for scores in seen:
        assert scores == pytest.approx(new, abs=1e-5)


def test_settings_that_no_run_could_have_are_refused_before_anything_is_served(base, tmp_path):
    for changes, message in (
        ({"adapter": {"method": "lora", "rank": 4}}, r"fine_tuning\.adapter\.rank"),
        ({"adapter": {"method": "ia3"}}, "a LoRA is trained beside requests, no ia3"),
        ({"adapter": {"method": "lora", "bias": "all"}}, "the base's own biases are served"),
        ({"adapter": {"method": "lora", "init_lora_weights": "pissa"}}, "it changes the base's weights"),
        ({"training": {"methods": ["streambp"]}}, "both set the token losses"),
        ({"training": {"gradient_checkpointing": True}}, "token_windows keeps less"),
        ({"step_seconds": 0}, "step_seconds"),
    ):
        with pytest.raises((SpecError, ValueError), match=message):
            given = ServeSpec.model_validate(
                {"model": str(base), "fine_tuning": {"folder": str(tmp_path / "ft"), **changes}}
            ).fine_tuning
            from toolkit.serving.finetuning.jobs import _check

            assert given
            _check(given)
