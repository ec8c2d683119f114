"""A run that is killed at any moment of writing a checkpoint goes on from the last whole one, to the same bytes.

One process imports all and forks a child for each moment; each kills itself with SIGKILL at the n-th time that a file
of a checkpoint is opened for writing, or an older checkpoint is removed.
"""

from __future__ import annotations

import json
import subprocess
import sys

from toolkit.data.rows import write_rows

SCRIPT = """
import json, os, sys, signal
from pathlib import Path
import toolkit.adapters.trainer  # before the forks, so that no child has to
from toolkit.adapters.train import train

spec, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
count = [0, 0]

def watch(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and "r" not in arguments[1]:
        what = str(arguments[0])
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
        what = str(arguments[0])
    else:
        return
    if "checkpoint-" in what:
        count[0] += 1
        if count[0] == count[1]:
            os.kill(os.getpid(), signal.SIGKILL)

def child(task):
    pid = os.fork()
    if pid == 0:
        try:
            task()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(pid, 0)[1]

def counted():
    sys.addaudithook(watch)
    train(spec, folder / "whole", quiet=True)
    (folder / "count").write_text(str(count[0]))

def killed(moment):
    count[1] = moment
    sys.addaudithook(watch)
    train(spec, folder / f"at{moment}", quiet=True)

assert child(counted) == 0
total = int((folder / "count").read_text())
name = "adapter_model.safetensors"
wanted = (folder / "whole" / name).read_bytes()
lost = []
moments = sorted({max(1, total * part // 6) for part in range(1, 6)})
for moment in moments:
    assert os.WTERMSIG(child(lambda: killed(moment))) == signal.SIGKILL, moment
    out = folder / f"at{moment}"
    if not out.exists():  # else it was whole, and only its checkpoints were about to go
        assert child(lambda: train(spec, out, resume=True, quiet=True)) == 0, moment
    if (out / name).read_bytes() != wanted:
        lost.append(moment)
print(json.dumps({"moments": moments, "lost": lost}))
"""


def test_any_moment(base, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i} ", "completion": str(i % 7)} for i in range(16)])
    training = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "save_steps": 1, "save_total_limit": 1}
    spec = {"base": str(base), "adapter": {"r": 2}, "data": {"train": str(tmp_path / "rows.jsonl")}, "device": "cpu"}
    words = [sys.executable, "-c", SCRIPT, json.dumps(spec | {"training": training | {"report_to": []}}), str(tmp_path)]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["lost"] == []
    assert len(found["moments"]) == 5
