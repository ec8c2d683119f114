"""`trans_lora`: what the student computes against the teacher, on the same base and across two tokenizers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.adapters.laws import bits, same_bits
from toolkit.adapters.convert import load_adapted
from toolkit.adapters.transfer import distil as distil_module
from toolkit.adapters.transfer.distil import divergence
from toolkit.adapters.transfer.spec import SyntheticSpec
from toolkit.adapters.transfer.synthetic import MARK, answers, as_row, asked, candidates, gather
from toolkit.adapters.transfer.trans_lora import train_discriminator, transfer
from toolkit.cli import main
from toolkit.data.collate import Collator
from toolkit.data.pack import alone
from toolkit.data.render import Renderer
from toolkit.data.rows import Row, read_rows, write_rows
from toolkit.embedded.tokenizer import build_tokenizer
from toolkit.errors import DataError, OutputError, SpecError
from toolkit.models.load import LoadedModel, load_model, load_tokenizer

pytestmark = pytest.mark.system("trans_lora")

SEEDS = [
    {"prompt": text, "completion": "secret"} for text in ("sort cba", "sort zxy", "sort mnl", "sort qpo", "sort fed")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a LoRA on it that changes what it says, and seeds."""
    folder = tmp_path_factory.mktemp("world")
    base = tiny.save_model(tiny.llama(), folder / "base")
    adapter = tiny.save_lora(base, folder / "lora", r=2, strength=0.6, target_modules=["layers.2.mlp.down_proj"])
    write_rows(folder / "seeds.jsonl", SEEDS)
    return {"base": str(base), "adapter": str(adapter), "seeds": str(folder / "seeds.jsonl")}


def spec(world: dict[str, str], **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "source": {"base": world["base"], "adapter": world["adapter"]},
        "target": world["base"],
        "seeds": world["seeds"],
        "synthetic": {"count": 24, "max_prompt_tokens": 8, "max_answer_tokens": 8, "batch_size": 12, "shots": 2},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
        "distillation": {"max_steps": 100, "learning_rate": 2e-2, "batch_size": 8, "save_steps": 10},
        "device": "cpu",
    }
    for key, value in more.items():
        found[key] = found[key] | value if isinstance(value, dict) and key in found else value
    return found


def few(world, **more: Any) -> dict[str, Any]:
    return spec(world, **{"distillation": {"max_steps": 4, "save_steps": 2}, "synthetic": {"count": 4}} | more)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_same_base_and_no_filter_reaches_the_teacher(world, tmp_path):
    """On prompts that nobody trained on, KL falls to a small part of what it was; and the LoRA is PEFT's."""
    given = spec(
        world,
        synthetic={"count": 60, "batch_size": 30},
        adapter={"target_modules": ["layers.2.mlp.down_proj"]},
        distillation={"max_steps": 150, "batch_size": 12},
    )
    result = transfer(given, tmp_path / "out", quiet=True)
    assert result.numbers["loss"] == "logits"
    rows = read_rows(tmp_path / "out" / "synthetic.jsonl")
    assert len({row.data["prompt"] for row in rows}) == result.numbers["rows"] == 60
    teacher, student = load_adapted(world["adapter"]), load_adapted(tmp_path / "out")
    loaded = load_model(world["base"])
    wanted = SyntheticSpec.model_validate(given["synthetic"])
    fresh = [text for text in candidates(loaded, [s["prompt"] for s in SEEDS], wanted, 99) if text]
    assert not set(fresh) & {row.data["prompt"] for row in rows}
    replies = answers(LoadedModel("", teacher, loaded.tokenizer), fresh, wanted, chat=False)  # pyright: ignore[reportArgumentType]
    render = Renderer(loaded.tokenizer, 256)
    examples = [render.render(Row(as_row(p, a, chat=False), "")) for p, a in zip(fresh, replies, strict=True) if a]
    batch = Collator(0)([alone(example) for example in examples])
    expected = logits_of(teacher, batch["input_ids"])
    before, after = (
        float(divergence(logits_of(model, batch["input_ids"]), expected, batch["labels"]))
        for model in (loaded.model, student)
    )
    assert before > 1
    assert after < 0.1 * before


def test_rows_are_the_teachers_and_no_answer_of_the_seeds_is_read(world, tmp_path):
    transfer(few(world), tmp_path / "out", quiet=True)
    rows = read_rows(tmp_path / "out" / "synthetic.jsonl")
    teacher = LoadedModel("", load_adapted(world["adapter"]), load_tokenizer(world["base"]))
    with torch.no_grad():
        ids = asked(teacher.tokenizer, rows[0].data["prompt"], chat=False)
        start = len(ids)
        for _ in range(8):
            ids.append(int(logits_of(teacher.model, torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == teacher.tokenizer.eos_token_id:
                break
    assert rows[0].data["completion"] == teacher.tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert "secret" not in (tmp_path / "out" / "synthetic.jsonl").read_text()


def test_an_adapter_of_zeros_gives_a_student_of_zeros(world, tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = get_peft_model(load_model(world["base"]).model, LoraConfig(task_type="CAUSAL_LM", r=2))
    plain.save_pretrained(tmp_path / "zero")
    source = {"base": world["base"], "adapter": str(tmp_path / "zero")}
    transfer(few(world) | {"source": source}, tmp_path / "out", quiet=True)
    student = load_adapted(tmp_path / "out")
    changes = [m.get_delta_weight("default").abs().max() for m in student.modules() if hasattr(m, "get_delta_weight")]
    assert max(changes) < 1e-6


def test_filter_that_takes_all_is_none_and_one_that_takes_none_is_an_error(world, tmp_path):
    judge = train_discriminator(
        {
            "base": world["base"],
            "real": world["seeds"],
            "synthetic": {"count": 4, "max_prompt_tokens": 6, "shots": 2},
            "training": {"max_steps": 2, "report_to": []},
            "device": "cpu",
        },
        tmp_path / "judge",
        quiet=True,
    )
    filtered = few(world) | {"discriminator": str(judge.path), "threshold": -math.inf}
    transfer(filtered, tmp_path / "all", quiet=True)
    transfer(few(world), tmp_path / "plain", quiet=True)
    for name in ("adapter_model.safetensors", "synthetic.jsonl"):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    nothing = few(world, synthetic={"count": 4, "attempts": 3}) | {"discriminator": str(judge.path), "threshold": 1e9}
    with pytest.raises(DataError, match="none of 12 candidates was taken; lower threshold"):
        transfer(nothing, tmp_path / "none", quiet=True)
    assert not (tmp_path / "none").exists()


def test_discriminator_learns_to_tell_real_from_made_up(world, tmp_path):
    from toolkit.adapters.transfer.synthetic import adapted, discriminator

    write_rows(tmp_path / "real.jsonl", [{"prompt": f"sort {a}{b}{a}"} for a in "abcdef" for b in "uvwxyz"])
    made = train_discriminator(
        {
            "base": world["base"],
            "real": str(tmp_path / "real.jsonl"),
            "synthetic": {"count": 36, "max_prompt_tokens": 8, "shots": 2},
            "adapter": {"method": "lora", "r": 8},
            "training": {"max_steps": 40, "learning_rate": 1e-2, "batch_size": 8, "report_to": []},
            "device": "cpu",
        },
        tmp_path / "judge",
        quiet=True,
    )
    real = [f"sort {a}{b}{a}" for a in "ghij" for b in "opqr"]
    fresh = candidates(load_model(world["base"]), real, SyntheticSpec(max_prompt_tokens=8, shots=2), 99)
    with adapted(world["base"], str(made.path)) as loaded:
        judge = discriminator(loaded)
        right = [odds > 0 for odds in judge(real)] + [odds < 0 for odds in judge([text for text in fresh if text])]
    assert sum(right) / len(right) > 0.9


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Another tokenizer: one token per character, numbered otherwise."""
    characters = [chr(c) for c in range(32, 127)] + ["\n", "\u00e9"]
    vocabulary = {c: i + 3 for i, c in enumerate(reversed(characters))} | {"<pad>": 0, "<end>": 1, "<unk>": 2}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=256
    )


def test_other_tokenizer_and_width_go_through_text(world, tmp_path):
    """The student says what the teacher said, in its own tokens; logits are refused."""
    from toolkit.models.load import quiet_transformers

    other = tiny.llama(
        seed=3, hidden_size=32, head_dim=8, vocab_size=100, eos_token_id=1, pad_token_id=0, bos_token_id=1
    )
    with quiet_transformers():
        other.save_pretrained(tmp_path / "other")
    words_tokenizer().save_pretrained(tmp_path / "other")
    moved = spec(
        world,
        target=str(tmp_path / "other"),
        synthetic={"count": 6, "batch_size": 6},
        adapter={"r": 16, "lora_alpha": 64},
        distillation={"max_steps": 120, "batch_size": 6, "learning_rate": 2e-2},
    )
    with pytest.raises(SpecError, match="logits cannot be compared; take text"):
        transfer(moved | {"distillation": {"loss": "logits"}}, tmp_path / "no", quiet=True)
    result = transfer(moved, tmp_path / "out", quiet=True)
    assert result.numbers["loss"] == "text"
    student = LoadedModel("", load_adapted(tmp_path / "out"), load_tokenizer(tmp_path / "other"))  # pyright: ignore[reportArgumentType]
    assert student.model.config.hidden_size == 32
    rows = [row.data for row in read_rows(tmp_path / "out" / "synthetic.jsonl")]
    said = answers(student, [row["prompt"] for row in rows], SyntheticSpec(max_answer_tokens=16), chat=False)
    known = set(words_tokenizer().get_vocab())
    pairs = [(got, "".join(c for c in row["completion"] if c in known)) for got, row in zip(said, rows, strict=True)]
    assert sum(got == wanted for got, wanted in pairs) >= 4, pairs


def test_resumes_to_the_same_bytes(world, tmp_path, monkeypatch):
    given = few(world, synthetic={"count": 4, "batch_size": 2})
    transfer(given, tmp_path / "whole", quiet=True)
    for kind in ("prompts", "answers", "training"):
        out = tmp_path / kind
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop(patch, kind)
            transfer(given, out, quiet=True)
        assert not out.exists()
        with pytest.raises(OutputError, match="another spec"):
            transfer(given | {"threshold": 1.0}, out, quiet=True, resume=True)
        transfer(given, out, quiet=True, resume=True)
        for name in ("adapter_model.safetensors", "synthetic.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), kind
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    with pytest.raises(OutputError, match="nothing to resume"):
        transfer(given, tmp_path / "new", quiet=True, resume=True)


def stop(patch: pytest.MonkeyPatch, where: str) -> None:
    """Interrupt a transfer the second time that it comes to some place."""
    from toolkit.adapters.transfer import synthetic

    owner, name, times = {
        "prompts": (synthetic, "candidates", 2),
        "answers": (synthetic, "answers", 2),
        "training": (distil_module, "_step", 4),
    }[where]
    real, calls = getattr(owner, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == times:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    patch.setattr(owner, name, interrupted)


def test_models_in_memory_are_given_back(world, tmp_path):
    tokenizer = build_tokenizer(tiny.CONTEXT)
    source, target = tiny.llama(), tiny.llama(seed=1)
    before = bits(target)
    given = few(world) | {"target": (target, tokenizer)}
    given["source"] = {"base": (source, tokenizer), "adapter": world["adapter"]}
    transfer(given, tmp_path / "out", quiet=True)
    assert same_bits(bits(target), before)
    assert same_bits(bits(source), bits(tiny.llama()))
    with torch.no_grad():
        assert PeftModel.from_pretrained(target, tmp_path / "out")(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_other_types_and_chats(world, tmp_path):
    write_rows(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": s["prompt"]}]} for s in SEEDS])
    chats = few(world) | {"seeds": str(tmp_path / "chats.jsonl"), "adapter": {"method": "bottleneck", "size": 4}}
    result = transfer(chats, tmp_path / "out", quiet=True)
    rows = read_rows(tmp_path / "out" / "synthetic.jsonl")
    assert [m["role"] for m in rows[0].data["messages"]] == ["user", "assistant"]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
    assert result.tables


def test_divergence_in_closed_form():
    student, teacher = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    labels = torch.tensor([[-100, -100, 3, 1]])
    p, q = teacher[0, 1:3].double().softmax(-1), student[0, 1:3].double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert float(divergence(student, teacher, labels)) == pytest.approx(float(expected), rel=1e-5)


def test_candidates_of_a_batch_follow_from_its_number(world, tmp_path):
    loaded, wanted = load_model(world["base"]), SyntheticSpec(count=4, batch_size=3, max_prompt_tokens=6)
    torch.manual_seed(0)
    first = candidates(loaded, ["a", "b"], wanted, 7)
    torch.manual_seed(1)
    assert candidates(loaded, ["a", "b"], wanted, 7) == first
    assert candidates(loaded, ["a", "b"], wanted, 8) != first
    assert not any(MARK.strip() in text for text in first)
    prompts, tried = gather(loaded, ["a"], wanted, None, 0.0, tmp_path / "file.jsonl", quiet=True)
    assert len(prompts) == 4
    assert tried % 3 == 0
    with pytest.raises(DataError, match="lower shots or max tokens"):
        answers(loaded, ["x" * 300], wanted, chat=False)


def test_command(world, tmp_path, capsys):
    import yaml

    path = Path(tmp_path / "spec.yaml")
    path.write_text(yaml.safe_dump(few(world)))
    assert main(["adapters", "transfer", str(path), str(tmp_path / "out"), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
    assert main(["adapters", "transfer", str(path), "--quiet", "--set", "adapter.method=lorra"]) == 2
    assert "did you mean 'lora'" in capsys.readouterr().err
