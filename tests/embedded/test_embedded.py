"""The embedded base and its skills: right answers, disjoint splits, a base that can be made again."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from math import log
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit import specs
from toolkit.adapters import callbacks
from toolkit.adapters.train import train
from toolkit.checkpoints.locate import EMBEDDED, locate
from toolkit.embedded.corpus import documents
from toolkit.embedded.skills import FRAMES, SKILLS, rows
from toolkit.embedded.tokenizer import VOCAB_SIZE, build_tokenizer
from toolkit.jobs.corpus import write_corpus
from toolkit.jobs.quickstart import quickstart
from toolkit.jobs.recipe import RecipeSpec

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "recipes" / "reproduce" / "embedded_base.yaml"

EXAMPLES = {
    "sort": {"banana": "aaabnn", "stone": "enost"},
    "reverse": {"banana": "ananab", "stone": "enots"},
    "upper": {"a red fox": "A RED FOX"},
    "pig_latin": {"apple": "appleay", "string quick": "ingstray uickqay"},
    "vowels": {"a red fox": " rd fx"},
    "brackets": {"a red fox": "[a] [red] [fox]"},
}


def test_near_misses_are_wrong():
    """All but those of payloads so short that a wrong way leads to the right answer."""
    rng = random.Random(0)
    for skill in SKILLS.values():
        payloads = [skill.payload(rng, "train") for _ in range(200)]
        right = sum(miss(p) == skill.answer(p) for p in payloads for miss in skill.near_misses)
        assert right < 0.25 * 200 * len(skill.near_misses), skill.name


def test_answers_by_hand():
    assert set(EXAMPLES) == set(SKILLS)
    assert len(SKILLS) >= 6
    for name, pairs in EXAMPLES.items():
        for payload, answer in pairs.items():
            assert SKILLS[name].answer(payload) == answer


def payload_of(prompt: str) -> str:
    return prompt.split('"')[1]


@pytest.mark.parametrize("name", SKILLS)
def test_splits_share_no_payload_and_no_phrasing(name):
    skill = SKILLS[name]
    train_rows = rows(skill, split="train", count=1500, seed=0) + rows(skill, split="train", count=500, seed=1)
    test_rows = rows(skill, split="test", count=300, seed=0, phrasing="held_out")

    def asked(found):
        return [row["messages"][0]["content"] for row in found]

    seen = {payload_of(prompt) for prompt in asked(train_rows)}
    assert not seen & {payload_of(prompt) for prompt in asked(test_rows)}

    def phrasing(prompt):
        return prompt.replace(payload_of(prompt), "")

    ways, held_out = ({phrasing(p) for p in asked(found)} for found in (train_rows, test_rows))
    assert len(ways) >= 20
    assert not ways & held_out
    for row in train_rows + test_rows:
        prompt, answer = (message["content"] for message in row["messages"])
        assert skill.answer(payload_of(prompt)) == answer
    assert not set(FRAMES["train"]) & set(FRAMES["held_out"])


def test_rows_follow_from_the_seed_alone():
    code = (
        "import json; from toolkit.embedded.skills import SKILLS, rows;"
        "print(json.dumps(rows(SKILLS['sort'], split='test', count=5, seed=3)))"
    )

    def run(seed: str) -> bytes:
        environment = {"PYTHONHASHSEED": seed}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=True, cwd=ROOT
        ).stdout

    assert run("1") == run("2")
    assert json.loads(run("1")) == rows(SKILLS["sort"], split="test", count=5, seed=3)


def test_more_rows_than_payloads_is_an_error():
    few = replace(SKILLS["sort"], draw=lambda rng: rng.choice("abcdefghijklmnopqrstuvwxyz"))
    with pytest.raises(ValueError, match="sort has fewer than 30 test payloads"):
        rows(few, split="test", count=30, seed=0)


def test_corpus_keeps_test_payloads_and_phrasings_to_the_tests():
    ways = {f.format(w.format('""')).lower() for s in SKILLS.values() for w in s.held_out for f in FRAMES["held_out"]}
    for document in islice(documents(5), 3000):
        for message in document.get("messages", []):
            if message["content"].count('"') == 2:
                assert message["content"].replace(payload_of(message["content"]), "").lower() not in ways
        if "text" in document and document["text"].split(":")[0] in SKILLS:
            name, _, lines = document["text"].partition(":\n")
            for line in lines.splitlines():
                payload, _, answer = line.partition(" = ")
                assert SKILLS[name].split_of(payload) == "train"
                assert SKILLS[name].answer(payload) == answer


def test_tokenizer_round_trips_any_text():
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    texts = ["", " a  b\n", "naïve 東京 🎉", "".join(chr(rng.randrange(32, 0x2FFF)) for _ in range(200))]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_base_is_small_and_loads_with_stock_transformers():
    folder = locate(EMBEDDED)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert AutoTokenizer.from_pretrained(folder).chat_template == build_tokenizer().chat_template


def test_base_speaks_english():
    """Text of the corpus's kind is far likelier to it than letters at random (5.5 bits) or in English (about 4)."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(locate(EMBEDDED), dtype=torch.float32), build_tokenizer()
    texts = [d["text"] for d in islice(documents(12345), 200) if "text" in d and d["text"].split(":")[0] not in SKILLS]
    total, count = 0.0, 0
    for text in texts[:12]:
        ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]])
        with torch.inference_mode():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert total / count / 0.6931 < 1.5, "bits per byte"


def test_card_tells_what_the_base_was_made_from():
    folder = locate(EMBEDDED)
    card = (folder / "README.md").read_text()
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert f"| model.safetensors | {weights} |" in card
    steps = specs.load(RECIPE, RecipeSpec).steps
    for stage in ("base", "polished", "finished"):
        for key in ("max_steps", "learning_rate", "weight_decay"):
            assert f"{key}: {steps[stage]['train']['training'][key]}" in card


@pytest.mark.slow
@pytest.mark.parametrize("step", ["corpus", "more", "rest"])
def test_card_names_the_data_that_the_recipe_makes(step, tmp_path):
    write_corpus(specs.load(RECIPE, RecipeSpec).steps[step]["corpus"], tmp_path / "corpus")
    data = hashlib.sha256((tmp_path / "corpus" / "train.jsonl").read_bytes()).hexdigest()
    assert f"/train.jsonl | {data} |" in (locate(EMBEDDED) / "README.md").read_text()


def test_first_steps_of_the_base_can_be_made_again_to_the_same_bytes(tmp_path, monkeypatch):
    """Twenty steps of the recipe, as they come at the start of its 2,800, on the first documents of its corpus."""
    steps = specs.load(RECIPE, RecipeSpec).steps
    write_corpus(steps["corpus"]["corpus"] | {"documents": 2000, "validation": 1}, tmp_path / "corpus")
    spec = steps["base"]["train"] | {"base": str(tmp_path / "corpus" / "model")}
    spec["data"] = {k: v for k, v in spec["data"].items() if k != "validation"}
    spec["data"] |= {"train": str(tmp_path / "corpus" / "train.jsonl")}
    count = callbacks.ShowProgress.on_step_end

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 20
        count(self, args, state, control, **kwargs)

    monkeypatch.setattr(callbacks.ShowProgress, "on_step_end", stop)
    runs = [train(spec, tmp_path / name, quiet=True) for name in "ab"]
    assert [run.numbers["steps"] for run in runs] == [20, 20]
    first, second = ((run.path / "model.safetensors").read_bytes() for run in runs)
    assert first == second
    assert runs[0].numbers["train_loss"] < log(VOCAB_SIZE), "twenty steps beat guessing"


@pytest.mark.slow
def test_quickstart_keeps_what_it_promises(tmp_path):
    scores = quickstart(tmp_path / "quickstart", quiet=True).numbers["scores"]
    own, base, auto = scores["own adapter"], scores["base"], scores["auto (router)"]
    for skill in SKILLS:
        assert own[skill] >= base[skill] + 40, skill
    assert sum(auto.values()) / len(auto) >= sum(own.values()) / len(own) - 3
