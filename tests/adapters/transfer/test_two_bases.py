"""An adapter moved to a base of another width and another tokenizer, with a few seeds and none of its data."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch

import toolkit
from tests import tiny
from toolkit.adapters.convert import load_adapted
from toolkit.adapters.transfer.spec import SyntheticSpec
from toolkit.adapters.transfer.synthetic import candidates
from toolkit.adapters.transfer.trans_lora import transfer
from toolkit.data.rows import read_rows, write_rows
from toolkit.embedded.tokenizer import build_tokenizer, learn_merges
from toolkit.jobs.skills import write_skills
from toolkit.models.load import load_model, load_tokenizer

pytestmark = pytest.mark.system("trans_lora")
SECOND = Path(__file__).parent.parent.parent / "second_base"
SYNTHETIC = {"start": "seed", "max_prompt_tokens": 60, "max_answer_tokens": 60, "batch_size": 32}


def test_bases_differ():
    first, second = load_model("toolkit:base"), load_model(str(SECOND))
    sizes = [(m.config.hidden_size, m.config.vocab_size) for m in (first.model, second.model)]
    assert sizes == [(192, 262), (128, 326)]
    text = 'Write "stone" backwards, ünd zurück!'
    ids = [loaded.tokenizer.encode(text, add_special_tokens=False) for loaded in (first, second)]
    assert len(ids[1]) < len(ids[0])
    assert [one.tokenizer.decode(i) for one, i in zip((first, second), ids, strict=True)] == [text, text]
    assert sum(path.stat().st_size for path in SECOND.iterdir()) < 2_000_000
    digest = hashlib.sha256((SECOND / "model.safetensors").read_bytes()).hexdigest()
    assert re.search(f"`{digest}`", (SECOND / "README.md").read_text())


def test_merges_are_those_of_byte_pair_encoding():
    """By hand: `th` is the most frequent pair, then `the`; nothing is merged across words."""
    merges = learn_merges(["the then them", "the thin"], 2)
    assert merges == [("t", "h"), ("th", "e")]
    tokenizer = build_tokenizer(64, merges)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("the bath e")] == ["the", " ", "b", "a", "th", " ", "e"]
    assert len(tokenizer) == 256 + 2 + 6


def test_candidates_begin_as_seeds_do():
    loaded = load_model("toolkit:base")
    seeds = ['Could you write "abc def" in capitals?']
    found = candidates(loaded, seeds, SyntheticSpec.model_validate(SYNTHETIC), 0)
    again = candidates(loaded, seeds, SyntheticSpec.model_validate(SYNTHETIC), 0)
    words = seeds[0].split(" ")
    shared = [next((n for n in range(len(words), 0, -1) if text.startswith(" ".join(words[:n]))), 0) for text in found]
    assert found == again
    assert len(set(found)) > 5
    assert {0, 2, 4} <= set(shared) or len(set(shared)) > 3


def test_a_student_across_tokenizers_learns_from_text(tmp_path):
    adapter = tiny.save_lora(toolkit.checkpoints.locate.locate("toolkit:base"), tmp_path / "lora", strength=0.02)
    write_rows(tmp_path / "seeds.jsonl", [{"prompt": "Sort the letters of abc.", "completion": "x"}])
    result = transfer(
        {
            "source": {"base": "toolkit:base", "adapter": str(adapter)},
            "target": str(SECOND),
            "seeds": str(tmp_path / "seeds.jsonl"),
            "synthetic": {**SYNTHETIC, "count": 3, "max_prompt_tokens": 24, "max_answer_tokens": 8},
            "adapter": {"method": "lora", "r": 4, "target_modules": "all-linear"},
            "distillation": {"max_steps": 3},
            "device": "cpu",
        },
        tmp_path / "out",
        quiet=True,
    )
    assert (result.numbers["loss"], result.numbers["rows"]) == ("text", 3)
    ids = torch.tensor([load_tokenizer(str(SECOND)).encode("Sort the letters")])
    plain, student = load_model(str(SECOND)).model, load_adapted(tmp_path / "out")
    with torch.no_grad():
        assert not torch.equal(student(ids).logits, plain(ids).logits)


@pytest.mark.slow
def test_a_skill_survives_the_move(tmp_path):
    """Trained on one base, moved by eight seeds: the other base has it too, though it never saw a row of it."""
    write_skills({"train": 3000, "test": 50}, tmp_path / "skills", quiet=True)
    train, test = (str(tmp_path / "skills" / f"upper.{split}.jsonl") for split in ("train", "test"))
    recipe = {
        "base": "toolkit:base",
        "data": {"train": train},
        "adapter": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "training": {"max_steps": 115, "batch_size": 32, "learning_rate": 0.005, "warmup_steps": 5, "report_to": []},
        "device": "cpu",
    }
    toolkit.train(recipe, str(tmp_path / "upper"), quiet=True)
    write_rows(tmp_path / "seeds.jsonl", [row.data for row in read_rows(train)[:8]])
    transfer(
        {
            "source": {"base": "toolkit:base", "adapter": str(tmp_path / "upper")},
            "target": str(SECOND),
            "seeds": str(tmp_path / "seeds.jsonl"),
            "synthetic": {**SYNTHETIC, "count": 400},
            "adapter": {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "distillation": {"max_steps": 300, "learning_rate": 0.004},
            "device": "cpu",
        },
        tmp_path / "moved",
        quiet=True,
    )
    tasks = {"upper": {"data": test, "max_tokens": 40}}
    scores = [
        toolkit.evaluate({"base": base, "adapters": {"own": str(folder)}, "tasks": tasks}, quiet=True).to_dict()[
            "scores"
        ]
        for base, folder in (("toolkit:base", tmp_path / "upper"), (str(SECOND), tmp_path / "moved"))
    ]
    own, moved = (found["own"]["upper"] for found in scores)
    assert scores[1]["base"]["upper"] < 20
    assert moved > 0.8 * own > 40
