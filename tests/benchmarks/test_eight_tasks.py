"""The study of eight tasks, whole and small: layout, shifts, corpora, and one run that is stopped and goes on."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from benchmarks.eight_tasks import __main__ as study
from benchmarks.eight_tasks import encoder, make_data, rows
from benchmarks.eight_tasks.data import SHIFTS, read_tasks, shifted
from benchmarks.eight_tasks.report import spread
from benchmarks.eight_tasks.study import Study
from tests import tiny
from tests.merge.learned import problems
from toolkit.errors import DataError, MissingError
from toolkit.merge.learning.heads import read_head

WORDS = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny encoder in `base`, and two tasks in `data` whose label a word says."""
    folder = tmp_path_factory.mktemp("study")
    tiny.save_model(problems.bert(), folder / "base")
    rng = random.Random(0)
    for task in range(2):
        for split, count in (("train", 48), ("validation", 16), ("test", 16)):
            kinds = [rng.randrange(2 + task) for _ in range(count)]
            data = [{"text": f"{WORDS[k]} {rng.randrange(100)} word", "label": f"class{k}"} for k in kinds]
            (folder / "data" / f"task{task}").mkdir(parents=True, exist_ok=True)
            problems.rows(folder / "data" / f"task{task}" / f"{split}.jsonl", data)
    return folder


def run(place: Path, out: str, *options: str) -> int:
    given = [str(place / "data"), str(place / out), "--base", str(place / "base"), "--quiet", "--epochs", "1"]
    return study.main([*given, "--steps", "1", "--rate", "1e-3", *options])


def test_a_stopped_run_goes_on_and_writes_everything(place, monkeypatch, capsys):
    """Stopped in the middle of the rows; the second run trains nothing again, and the third measures nothing."""
    own, calls = rows._static, []

    def stops(made, name):
        calls.append(name)
        if name == "TSV-M" and calls.count(name) == 1:
            raise KeyboardInterrupt
        return own(made, name)

    monkeypatch.setattr(rows, "_static", stops)
    with pytest.raises(KeyboardInterrupt):
        run(place, "out")
    monkeypatch.setattr(encoder, "fine_tune", lambda *args, **options: pytest.fail("trained again"))
    assert run(place, "out") == 0
    assert calls.count("TIES") == 1
    assert calls.count("TSV-M") == 2
    monkeypatch.setattr(encoder, "features", lambda *args: pytest.fail("measured again"))
    assert run(place, "out") == 0
    capsys.readouterr()
    check_results(place / "out")
    assert run(place, "out", "--limit", "7") == 1
    assert "limit 4000, not 7; name another folder" in capsys.readouterr().err


def check_results(out: Path) -> None:
    ((_, measured),) = [(s["seed"], s["rows"]) for s in json.loads((out / "results.json").read_text())["seeds"]]
    names = {"zero-shot", "individual", "joint training", *rows.STATIC, "AdaMerging (task)", "AdaMerging (layer)"}
    assert names | {"aTLAS", "Self Positioning", "TALL masks", "1-bit deltas"} <= set(measured)
    table = (out / "table.md").read_text()
    assert all(f"| {name} |" in table for name in measured)
    for name, row in measured.items():
        assert set(row["accuracy"]) == {"task0", "task1"}, name
        assert all(0 <= score <= 100 and (score * 16 / 100).is_integer() for score in row["accuracy"].values())
    base = measured["zero-shot"]["bytes"]
    assert measured["individual"]["bytes"] == 2 * base
    assert base < measured["TALL masks, 16-bit vector"]["bytes"] < measured["TALL masks"]["bytes"] < 3 * base
    for name in ("accuracy_by_task", "accuracy_against_bytes"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_zero_shot_and_scaled_rows_against_another_program(place, tmp_path):
    """The accuracy of the untouched encoder, and of base + scale * change, row by row with plain transformers."""
    from benchmarks.eight_tasks.study import Settings

    settings = Settings(place / "data", place / "base", epochs=1, rate=1e-3)
    made = Study(settings, tmp_path, 0, quiet=True)
    made.prepare()
    tuned, model = problems.weights(made.individual["task0"]), problems.bert()
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def accuracy(task: str) -> float:
        data = [json.loads(line) for line in (place / "data" / task / "test.jsonl").read_text().splitlines()]
        head, right = made.heads[task], 0
        with torch.no_grad():
            for row in data:
                vector = model(torch.tensor([list(row["text"].encode())])).last_hidden_state.mean(1)
                logits = vector @ head.weight.T + head.bias
                right += head.labels[int(logits.argmax())] == row["label"]
        return 100 * right / len(data)

    made.use(made.base)
    assert made.measure("test") == {task: accuracy(task) for task in made.tasks}
    made.use(made.individual["task0"])
    made.place(made.change(), 0.5)
    model.load_state_dict({name: value + 0.5 * (tuned[name] - value) for name, value in start.items()})
    assert made.measure("test") == {task: accuracy(task) for task in made.tasks}


@pytest.mark.parametrize("peak", [0.05, 0.1, 0.42, 0.5, 0.9, 2.8, 7.0])
def test_the_best_scale_is_climbed_to(peak):
    """Any curve with one top; what is not on the way is not measured."""
    study, placed = Mock(), []
    study.place = lambda change, scale: placed.append(scale)
    study.measure = lambda split: {"a": -abs(placed[-1] - peak), "b": 0.0}
    best, found = rows._best_scale(study)
    assert best == min(rows.SCALES, key=lambda scale: abs(scale - peak)) == placed[-1]
    assert found == {str(scale): -abs(scale - peak) / 2 for scale in sorted(set(placed))}
    way = sorted((rows.SCALES.index(rows.FIRST), rows.SCALES.index(best)))
    assert len(found) <= way[1] - way[0] + 3


def test_heads_learn_and_fine_tuning_lowers_the_loss_under_any(place, tmp_path):
    loaded = encoder.load(place / "base")
    task = read_tasks(place / "data")["task0"]
    tokens = {split: encoder.tokenize(loaded, task.texts[split]) for split in ("train", "validation")}
    vectors = {split: encoder.features(loaded, rows) for split, rows in tokens.items()}
    head = encoder.fit_head(vectors, task)
    assert encoder.accuracy(loaded, head, tokens["train"], task.targets["train"]) > 80
    targets = torch.tensor(task.targets["train"])
    head = read_head(problems.head(tmp_path / "head", 0, task.labels))  # one that knows nothing, and stays so

    def loss() -> float:
        logits = head(encoder.features(loaded, tokens["train"]))
        return float(torch.nn.functional.cross_entropy(logits, targets))

    before = loss()
    encoder.fine_tune(
        loaded,
        {"task0": head},
        {"task0": task.targets["train"]},
        {"task0": tokens["train"]},
        epochs=4,
        rate=1e-3,
        seed=0,
        label="test",
        quiet=True,
    )
    assert loss() < 0.8 * before


@pytest.mark.slow
def test_shifted_inputs_lora_and_several_seeds(place):
    assert run(place, "lora", "--lora", "2", "--seeds", "2", "--shifted") == 0
    results = json.loads((place / "lora" / "results.json").read_text())
    assert [seed["seed"] for seed in results["seeds"]] == [0, 1]
    assert set(results["seeds"][1]["shifted"]) == set(SHIFTS)
    table = (place / "lora" / "table.md").read_text()
    assert "± " in table
    assert "| individual, patched by a signature |" in table
    rows = results["seeds"][0]["rows"]
    assert rows["individual"]["bytes"] < 2 * rows["zero-shot"]["bytes"]


def test_seeds_of_several_runs_are_joined(place, monkeypatch, capsys):
    """As if each had been measured elsewhere; what does not belong together is refused before anything is computed."""

    def measured(made: Study) -> dict[str, rows.Row]:
        row = {"accuracy": {"task0": 50.0 + made.seed, "task1": 60.0}, "bytes": 1, "data": "none"}
        return {"zero-shot": row, "individual": row}

    monkeypatch.setattr(study, "all_rows", measured)
    monkeypatch.setattr(Study, "prepare", lambda made: None)
    assert run(place, "one") == 0
    first = str(place / "one" / "results.json")
    assert run(place, "two", "--first-seed", "1", "--seeds", "2", "--join", first) == 0
    assert "3 seeds" in capsys.readouterr().out
    results = json.loads((place / "two" / "results.json").read_text())
    assert [seed["seed"] for seed in results["seeds"]] == [0, 1, 2]
    assert "| zero-shot | 51.0 | 60.0 | 55.5 ± 0.5 |" in (place / "two" / "table.md").read_text()

    assert run(place, "three", "--join", first) == 1
    assert f"--join {first}: seed 0 is there twice; --first-seed runs another" in capsys.readouterr().err
    assert run(place, "three", "--first-seed", "1", "--evaluated", "5", "--join", first) == 1
    assert f"--join {first}: its settings are others: evaluated None, not 5" in capsys.readouterr().err
    assert run(place, "three", "--join", str(place / "base" / "config.json")) == 1
    assert "config.json: no results of this study (KeyError: 'settings')" in capsys.readouterr().err
    assert not (place / "three").exists()


def test_layout_is_checked(place, tmp_path):
    with pytest.raises(MissingError, match=r"make it with python -m benchmarks\.eight_tasks\.make_data"):
        read_tasks(tmp_path / "nowhere")
    with pytest.raises(MissingError, match="a folder for each of several tasks, found 0"):
        read_tasks(tmp_path)
    for task in ("a", "b"):
        (tmp_path / task).mkdir()
        for split in ("train", "validation", "test"):
            problems.rows(tmp_path / task / f"{split}.jsonl", [{"text": "x", "label": name} for name in "yn"])
    assert read_tasks(tmp_path)["a"].labels == ("n", "y")
    problems.rows(tmp_path / "a" / "test.jsonl", [{"text": "x", "label": "z"}])
    with pytest.raises(DataError, match=r"a/test\.jsonl: label 'z' is none of the training rows'"):
        read_tasks(tmp_path)
    problems.rows(tmp_path / "a" / "test.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(DataError, match=r"test\.jsonl:1: expected text and label"):
        read_tasks(tmp_path)
    (tmp_path / "a" / "test.jsonl").unlink()
    with pytest.raises(MissingError, match="no such data file"):
        read_tasks(tmp_path)


def test_shifts_are_what_they_say_and_always_the_same():
    texts = [f"sentence number {i} about several ordinary things" for i in range(50)]
    for shift in SHIFTS:
        assert shifted(texts, shift) == shifted(texts, shift)
    assert shifted(texts, "capitals")[3] == texts[3].upper()
    assert shifted(texts, "truncation")[3] == "sentence number 3 about"
    typed = shifted(texts, "typos")
    changed = [
        (a, b)
        for one, other in zip(texts, typed, strict=True)
        for a, b in zip(one.split(), other.split(), strict=True)
        if a != b
    ]
    assert 0.08 < len(changed) / (7 * 50) < 0.25
    assert all(a[0] == b[0] and abs(len(a) - len(b)) <= 1 for a, b in changed)


def archive(files: dict[str, str]) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as written:
        for name, text in files.items():
            written.writestr(name, text.encode("cp1252"))
    return raw.getvalue()


def corpora(count: int = 40) -> dict[str, dict[str, str]]:
    """Files as their publishers have them, by the last part of the address."""
    subjects = [s for area in make_data.AREAS.values() for s in area.split()]
    question = '"Which {} is\nright {}?\nA. one\nB. two\nAnswer:",True,False\n'
    head = "prompt,mixtral-8x7b-instruct-v0.1,gpt-4-1106-preview\n"
    pairs = '<pair id="{0}" value="TRUE" task="IE"><t>A {0} &amp; b.</t><h>It is {0}.</h></pair>'
    later = '<pair id="{0}" entailment="NO" task="QA"><t>B {0}.</t><h>Not {0}.</h></pair>'

    def lines(form: str) -> str:
        return "\n".join(form.format(i) for i in range(count)) + "\n"

    return {
        "sentence_polarity": {"s/rt-polarity.pos": lines("good caf\xe9 {}"), "s/rt-polarity.neg": lines("bad {}")},
        "subjectivity": {"s/quote.tok.gt9.5000": lines("felt {}"), "s/plot.tok.gt9.5000": lines("happens {}")},
        "pros_cons": {
            "p/IntegratedPros.txt": lines("<Pros>light {}</Pros>"),
            "p/IntegratedCons.txt": lines(" <Cons>heavy {}</Cons>"),
        },
        "qc": {"qc/train.txt": lines("HUM:ind Who is {} ?"), "qc/test.txt": lines("NUM:count How many {} ?")},
        "names": {"names/female.txt": lines("Anna{}"), "names/male.txt": lines("Otto{}") + "Anna3\n"},
        "rte": {
            "rte/rte1_dev.xml": f"<entailment-corpus>{lines(pairs)}</entailment-corpus>",
            "rte/rte3_test.xml": f"<entailment-corpus>{lines(later)}</entailment-corpus>",
        },
        "abc": {
            "abc/rural.txt": lines("Farmers say that the rain of {} came too late. Nobody knows."),
            "abc/science.txt": lines("A study of {} stars shows that they are all quite old."),
        },
        "main": {
            f"R/mmlu/responses/mmlu_{s}.csv": head + question.format(s, 1) + question.format(s, 2) for s in subjects
        },
    }


def test_folder_made_of_the_public_corpora_is_one_that_is_read(tmp_path):
    files = corpora()
    make_data.make(tmp_path / "data", lambda url: archive(files[Path(url).stem]), quiet=True)
    tasks = read_tasks(tmp_path / "data")
    assert set(tasks) == set(make_data.TASKS)
    assert tasks["trec"].labels == ("HUM", "NUM")
    assert tasks["mmlu_area"].labels == ("humanities", "other", "social", "stem")
    for name, task in tasks.items():
        every = [text for split in task.texts.values() for text in split]
        assert len(every) == len(set(every)), name
        share = len(task.texts["test"]) / len(every)
        assert 0.15 < share < 0.25, name
    every = {
        text: task.labels[t]
        for task in tasks.values()
        for s in task.texts
        for text, t in zip(task.texts[s], task.targets[s], strict=True)
    }
    assert every["good caf\xe9 3"] == "positive"
    assert every["light 5"] == "pro"
    assert every["Who is 7 ?"] == "HUM"
    assert every["A 4 & b. [SEP] It is 4."] == "entailment"
    assert every["B 4. [SEP] Not 4."] == "not_entailment"
    assert every["Which virology is right 2?"] == "other"
    assert "Anna3" not in every, "it has two labels"
    assert "Nobody knows." not in every, "it is too short"


def test_corpora_that_cannot_be_had(tmp_path, monkeypatch, capsys):
    import urllib.error

    def fails(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(make_data.urllib.request, "urlopen", fails)
    assert make_data.main([str(tmp_path / "data")]) == 1
    assert "sentence_polarity.zip: cannot be downloaded (no network)" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    with pytest.raises(DataError, match=r"the archive holds no rt-polarity\.pos"):
        make_data.make(tmp_path / "data", lambda url: archive({"other": ""}), quiet=True)


def test_spread():
    assert spread([3.0]) == "3.0"
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
