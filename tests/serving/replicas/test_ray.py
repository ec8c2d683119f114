"""Two replicas on Ray Serve, one of which is killed under load."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from toolkit.cli import main
from toolkit.serving.engine import Engine
from toolkit.serving.request import Sampling

pytest.importorskip("ray", reason="needs ray, of the extra ray")
PROMPTS = [f"{n} times upon a time" for n in range(24)]
TOKENS = 120


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where Ray itself does not start, such as in a sandbox without shared memory."""
    code = "import ray; ray.init(include_dashboard=False, logging_level='ERROR'); ray.shutdown()"
    log = tmp_path_factory.mktemp("ray") / "log"
    try:
        with log.open("w") as file:  # no pipe, which Ray's own processes would hold open
            done = subprocess.run([sys.executable, "-c", code], stdout=file, stderr=file, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("Ray does not start here within two minutes")
    if done.returncode:
        pytest.skip(f"Ray does not start here: {log.read_text().strip().splitlines()[-1:]}")


@contextmanager
def serving(spec: dict[str, Any], folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Serve a spec as a user does; yield the address and the process."""
    (folder / "ray.yaml").write_text(json.dumps({"port": 0, **spec}))
    command = [sys.executable, "-m", "toolkit", "serve", "ray.yaml"]
    environment = os.environ | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    log = folder / "stderr"
    with log.open("w") as file:  # no pipe, which Ray's own processes would hold open
        process = subprocess.Popen(command, cwd=folder, stderr=file, stdout=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 180
        while not (found := re.search(r"listening on (http://\S+)/v1", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[1], psutil.Process(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        for left in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            left.kill()
        process.kill()


def replicas(server: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in server.children(recursive=True):
        try:
            if "ServeReplica:toolkit:replicas" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has gone meanwhile
            pass
    return found


def body(prompt: str, model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **more}


async def whole(client: httpx.AsyncClient, prompt: str, model: str) -> tuple[str, int]:
    response = await client.post("/v1/completions", json=body(prompt, model))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"], int(response.headers["x-toolkit-attempts"])


async def streamed(client: httpx.AsyncClient, prompt: str, model: str) -> tuple[str, dict[str, Any] | None]:
    """Return the text of a stream, and the error that ended it."""
    text = ""
    async with client.stream("POST", "/v1/completions", json=body(prompt, model, stream=True)) as response:
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return text, event["error"]
            text += event["choices"][0]["text"]
    return text, None


@pytest.mark.slow  # two servers, and Ray's own ten processes, on however many cores there are
@pytest.mark.usefixtures("ray")
def test_one_of_two_replicas_is_killed_under_load(base, loras, tmp_path):
    spec = {
        "model": str(base),
        "adapters": {"plain": str(loras["plain"])},
        "limits": {"max_requests": 32, "page_size": 4},
    }
    spec |= {"ray": {"min_replicas": 2, "max_replicas": 2, "cpus": 0.5}}
    models = ["base", "plain"] * (len(PROMPTS) // 2)
    with Engine(str(base), {"plain": loras["plain"]}) as engine:
        wanted = engine.generate(PROMPTS, models, Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True))
    expected = {(p, m): answer.text for p, m, answer in zip(PROMPTS, models, wanted, strict=True)}

    async def load(address: str, server: psutil.Process) -> None:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=120, limits=limits) as client:
            # Both have to have begun, or the one that is killed may hold nothing.
            await asyncio.gather(*(whole(client, prompt, "base") for prompt in PROMPTS[:8]))
            before = replicas(server)
            assert len(before) == 2
            answers = [asyncio.ensure_future(whole(client, *key)) for key in expected]
            streams = [asyncio.ensure_future(streamed(client, *key)) for key in expected]
            while sum(task.done() for task in answers) < 3:
                await asyncio.sleep(0.01)
            held = sum(not task.done() for task in answers)
            before[0].kill()
            found = await asyncio.gather(*answers)
            assert [text for text, _ in found] == list(expected.values()), "none is lost, and all are right"
            retried = [attempts for _, attempts in found if attempts > 1]
            assert 0 < len(retried) <= held, "some were with the one that died"
            assert len(retried) < len(found), "those of the other one go on where they are"
            ends = await asyncio.gather(*streams)
            for (text, error), whole_text in zip(ends, expected.values(), strict=True):
                if error is None:
                    assert text == whole_text
                else:
                    assert error["code"] == "replica_died"
                    assert whole_text.startswith(text.rstrip("\ufffd"))
            assert any(error for _, error in ends)
            assert any(error is None for _, error in ends)
            await _replaced(server, before[0].pid)
            again = await asyncio.gather(*(whole(client, *key) for key in expected))
            assert again == [(text, 1) for text in expected.values()]

    with serving(spec, tmp_path) as (address, server):
        asyncio.run(load(address, server))


async def _replaced(server: psutil.Process, dead: int) -> None:
    deadline = time.monotonic() + 60
    while len(found := [p.pid for p in replicas(server)]) < 2 or dead in found:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


def test_what_does_not_go_with_replicas_is_refused_before_anything_starts(base, tmp_path, capsys):
    for block, message in (
        ({"ray": {"min_replicas": 3, "max_replicas": 2}}, "max_replicas is below min_replicas"),
        ({"ray": {"replicas": 2}}, "ray.replicas"),
        ({"ray": {}, "fine_tuning": {"folder": "ft"}}, "fine_tuning: one server trains, not several"),
    ):
        path = tmp_path / "wrong.yaml"
        path.write_text(json.dumps({"model": str(base), **block}))
        assert main(["serve", str(path), "--ray"]) == 2
        assert message in capsys.readouterr().err
