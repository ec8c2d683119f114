"""What the endpoints of fine-tuning answer is what the OpenAPI document says of them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.serving.http.described import Document
from toolkit.serving.engine import Engine
from toolkit.serving.serve import background_server
from toolkit.serving.spec import FineTuning, Limits


@pytest.fixture(scope="module")
def served(base, tmp_path_factory) -> Iterator[tuple[str, Document]]:
    given = {"folder": str(tmp_path_factory.mktemp("ft")), "adapter": {"method": "lora", "r": 2}}
    settings = FineTuning.model_validate(given | {"training": {"num_epochs": 1, "logging_steps": 1}})
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(str(base), limits=Limits(page_size=4)))
        url = stack.enter_context(background_server(engine, api_key="secret", fine_tuning=settings))
        headers = {"authorization": "Bearer secret"}
        yield url, Document(httpx.get(f"{url}/openapi.json", headers=headers, trust_env=False).json())


def ended(http: httpx.Client, job_id: str) -> str:
    for _ in range(3000):
        status = http.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"]
        if status not in ("queued", "running"):
            return status
        time.sleep(0.02)
    raise AssertionError(status)


def test_every_answer_is_as_described(served):
    url, document = served
    with document.client(url, headers={"authorization": "Bearer secret"}) as http:

        def ask(status: int, method: str, path: str, **options: object) -> httpx.Response:
            response = http.request(method, path, **options)  # pyright: ignore[reportArgumentType]
            assert response.status_code == status, response.text
            return response

        def send(rows: str, status: int = 200, name: str = "rows.jsonl") -> httpx.Response:
            return ask(status, "POST", "/v1/files", files={"file": (name, rows)}, data={"purpose": "fine-tune"})

        rows = send('{"prompt": "a", "completion": "b"}\n{"text": "abc"}\n').json()["id"]
        bad = send('{"prompt": "a"}\n').json()["id"]
        send("x", 400, "rows.txt")
        ask(400, "POST", "/v1/files", files={"file": ("rows.jsonl", "x")}, data={"purpose": "batch"})
        ask(200, "GET", f"/v1/files/{rows}")
        ask(200, "GET", f"/v1/files/{rows}/content")
        ask(200, "GET", "/v1/files?limit=1")
        ask(400, "GET", "/v1/files?limit=0")
        ask(400, "GET", "/v1/files?after=none")
        for path in ("/v1/files/none", "/v1/files/none/content", "/v1/fine_tuning/jobs/none"):
            ask(404, "GET", path)
        ask(404, "DELETE", "/v1/files/none")
        body = {"model": "base", "training_file": rows}
        job = ask(200, "POST", "/v1/fine_tuning/jobs", json=body | {"validation_file": rows, "suffix": "new"}).json()
        wrong = ask(200, "POST", "/v1/fine_tuning/jobs", json=body | {"training_file": bad}).json()
        assert (ended(http, job["id"]), ended(http, wrong["id"])) == ("succeeded", "failed")
        for found in (job, wrong):
            for part in ("", "/events?limit=100", "/checkpoints"):
                ask(200, "GET", f"/v1/fine_tuning/jobs/{found['id']}{part}")
        ask(200, "GET", "/v1/fine_tuning/jobs")
        ask(400, "POST", "/v1/fine_tuning/jobs", json=body | {"suffix": "new"})
        ask(404, "POST", "/v1/fine_tuning/jobs", json=body | {"model": "new"})
        ask(400, "POST", f"/v1/fine_tuning/jobs/{job['id']}/cancel")
        ask(404, "POST", "/v1/fine_tuning/jobs/none/cancel")
        epochs = {"hyperparameters": {"n_epochs": 1000}}
        long = ask(200, "POST", "/v1/fine_tuning/jobs", json=body | epochs).json()
        ask(200, "POST", f"/v1/fine_tuning/jobs/{long['id']}/cancel")
        ask(200, "DELETE", f"/v1/files/{bad}")
    asked = {(method, path) for method, path, _, _ in document.seen}
    mine = {(m.upper(), p) for p, i in document.document["paths"].items() for m in i if "/fi" in p}
    assert mine <= asked


def test_schemathesis_finds_nothing(served, tmp_path):
    url, _ = served
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"]
    command += ["--phases", "fuzzing,stateful", "--include-path-regex", "/v1/fi", "-n", "6", "--seed", "1"]
    command += ["-H", "Authorization: Bearer secret", "--generation-deterministic", "--no-color", "--warnings", "off"]
    command += ["--exclude-checks", "positive_data_acceptance", "--continue-on-failure"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
