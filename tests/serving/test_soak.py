"""A server under many clients for a while, and one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.serving.soak import State, leaks, soak


@pytest.mark.slow
def test_twenty_seconds(tmp_path):
    """The short form of `make soak`."""
    book = soak(20, 50, tmp_path)
    assert not book.faults, "\n".join(book.faults[:20])
    assert book.counts["compared"] > 200
    acts = {"whole", "streamed", "several", "leaves", "wrong", "too_late", "loads", "asks_own", "unloads"}
    assert all(book.counts[act] for act in acts)


def test_what_is_left_is_seen():
    before = State(3, 10, 20, 100)
    assert leaks(before, before) == []
    assert leaks(before, State(4, 10, 20, 100)) == ["tasks: 1 more than before"]
    assert leaks(before, State(3, 10, 25, 10**9)) == [
        "files: 5 more than before",
        "resident: 999,999,900 more than before",
    ]


def started(command: list[str], log: Path) -> tuple[subprocess.Popen[bytes], httpx.Client]:
    """Start a server and wait until it listens."""
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stderr=stream)
    ends = time.monotonic() + 60
    while "listening on " not in (text := log.read_text()):
        assert process.poll() is None, text
        assert time.monotonic() < ends, text
        time.sleep(0.05)
    url = text.split("listening on ")[1].split("/v1")[0]
    return process, httpx.Client(base_url=url, trust_env=False, timeout=60)


def test_a_killed_server_serves_again_from_the_same_folders(base, loras, tmp_path):
    """Killed in the middle of answers, after an adapter was loaded by a client."""
    files = sorted(p for folder in (base, loras["plain"], loras["wide"]) for p in folder.rglob("*") if p.is_file())
    contents = [path.read_bytes() for path in files]
    command = [
        str(Path(sys.executable).with_name("toolkit")),
        "serve",
        str(base),
        "--adapter",
        f"plain={loras['plain']}",
    ]
    command += ["--adapter-root", str(loras["wide"].parent), "--port"]
    ask = {"model": "wide", "prompt": "Once upon", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    process, http = started([*command, "0"], tmp_path / "first.log")
    try:
        with http:
            assert http.post("/v1/adapters", json={"name": "wide", "path": "wide"}).status_code == 201
            before = [
                http.post("/v1/completions", json=ask | {"model": m}).json()["choices"] for m in ("plain", "wide")
            ]
            port = http.base_url.port
            with http.stream("POST", "/v1/completions", json=ask | {"max_tokens": 200, "stream": True}) as stream:
                next(stream.iter_lines())
                os.kill(process.pid, signal.SIGKILL)
                assert process.wait(10) == -signal.SIGKILL
        assert [path.read_bytes() for path in files] == contents
        process, http = started([*command, str(port)], tmp_path / "second.log")  # the same port, at once
        with http:
            assert http.get("/ready").status_code == 200
            assert http.post("/v1/completions", json=ask).status_code == 404, "what clients loaded is not remembered"
            assert http.post("/v1/adapters", json={"name": "wide", "path": "wide"}).status_code == 201
            after = [http.post("/v1/completions", json=ask | {"model": m}).json()["choices"] for m in ("plain", "wide")]
        assert after == before
    finally:
        process.kill()
        process.wait()
