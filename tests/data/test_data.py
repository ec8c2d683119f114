"""Exactly the wanted tokens are trained, packed documents do not see each other, and bad rows are named."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tokenizers.processors import ByteLevel

from tests import tiny
from toolkit.data.collate import Collator
from toolkit.data.pack import alone, concatenate, pack
from toolkit.data.render import IGNORED, Example, Renderer
from toolkit.data.rows import Row, read_rows, split_answer, user_text
from toolkit.embedded.tokenizer import build_tokenizer
from toolkit.errors import DataError, MissingError


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(256)


def trained_text(example: Example, tokenizer) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "Goodbye, naïve café."},
]


def test_chat_trains_what_the_assistant_says_and_its_end(tokenizer):
    example = Renderer(tokenizer, 256).render(Row({"messages": CHAT}, "f:1"))
    assert trained_text(example, tokenizer) == "Hello.<|end|>Goodbye, naïve café.<|end|>"
    assert tokenizer.decode(example.tokens) == tokenizer.apply_chat_template(CHAT, tokenize=False)


BARE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
)


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("answer", ["😀", "naïve 東京 🎉", "é", "x", " spaced ", "two  "])
def test_all_of_an_answer_is_trained_and_nothing_else(answer, trims):
    """The block ends with the content here, so its last character may be any number of bytes, or be trimmed."""
    tokenizer = build_tokenizer(256)
    tokenizer.chat_template = BARE
    if trims:
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    chat = [{"role": r, "content": c} for r, c in (("user", "é "), ("assistant", answer)) * 2]
    example = Renderer(tokenizer, 256).render(Row({"messages": chat}, "f:1"))
    assert bytes(label for label in example.labels if label != IGNORED) == (answer * 2).encode()
    assert example.tokens == tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]


def test_tokenizers_that_do_not_know_characters_are_refused(tokenizer, monkeypatch):
    slow = build_tokenizer(256)
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(DataError, match="use a fast tokenizer, or set"):
        Renderer(slow, 256).render(Row({"messages": CHAT}, "f:1"))


def test_completion_trains_the_completion_and_its_end(tokenizer):
    row = Row({"prompt": "1 + 1 = ", "completion": "2"}, "f:1")
    example = Renderer(tokenizer, 256).render(row)
    assert trained_text(example, tokenizer) == "2<|end|>"
    assert tokenizer.decode(example.tokens) == "1 + 1 = 2<|end|>"
    assert example.num_trained == 2


def test_text_and_inputs_on_request_are_trained_whole(tokenizer):
    example = Renderer(tokenizer, 256).render(Row({"text": "abc"}, "f:1"))
    assert trained_text(example, tokenizer) == "abc<|end|>"
    everything = Renderer(tokenizer, 256, train_on_inputs=True)
    for data in ({"messages": CHAT}, {"prompt": "a", "completion": "b"}):
        example = everything.render(Row(data, "f:1"))
        assert example.labels == example.tokens


def write(path, *lines: object):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_rows_keep_their_places_and_blank_lines_do_not_count(tmp_path):
    file = write(tmp_path / "a.jsonl", {"text": "x"}, "", {"text": "y"})
    assert [row.place for row in read_rows(file)] == [f"{file}:1", f"{file}:3"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "the file has no rows"),
        (({"text": "x"}, "{oops"), r"a\.jsonl:2: not valid JSON"),
        (("[1]",), r"a\.jsonl:1: expected a JSON object, got list"),
        (({"text": "x"}, '{"text": "\\ud800"}'), r"a\.jsonl:2: half of a character"),
        (('{"messages": [{"role": "user", "content": "\\ud83d"}]}',), r"a\.jsonl:1: half of a character"),
        (('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",), r"a\.jsonl:1: nested too deeply"),
        (({"text": "x"}, "", '{"text": "x", "id": ' + "7" * 5000 + "}"), r"a\.jsonl:3: a number of too many digits"),
    ],
)
def test_bad_files(lines, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / "a.jsonl", *lines))


def test_whole_characters_may_be_spelled_in_halves(tmp_path):
    (row,) = read_rows(write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00 \\u00e9"}'))
    assert row.data == {"text": "😀 é"}


def test_missing_and_misencoded_files(tmp_path):
    with pytest.raises(MissingError, match=r"absent\.jsonl: no such data file"):
        read_rows(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1: not UTF-8"):
        read_rows(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nothing": 1}, "expected prompt and completion, messages, or text, got nothing"),
        ({"prompt": "x"}, "prompt and completion must both be text"),
        ({"prompt": "x", "completion": 3}, "must both be text"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] is not"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "the chat template refuses this row"),
        ({"prompt": "x", "completion": ""}, "no token of this row is trained"),
        ({"messages": CHAT[:2]}, "no token of this row is trained"),
        ({"text": "x" * 300}, "301 tokens, but max_length is 256"),
    ],
)
def test_bad_rows_are_named(data, message, tokenizer):
    with pytest.raises(DataError, match=message) as caught:
        Renderer(tokenizer, 256).render_all([Row({"text": "fine"}, "f:6"), Row(data, "f:7")])
    assert str(caught.value).startswith("f:7: ")


def test_limit_of_the_model_holds_whatever_the_spec_allows(tokenizer):
    row = Row({"text": "x" * 99}, "f:1")
    with pytest.raises(DataError, match="f:1: 100 tokens, but the model takes at most 64; shorten the row, or set"):
        Renderer(tokenizer, 256, context=64).render_all([row])
    (example,), report = Renderer(tokenizer, 256, "truncate", context=64).render_all([row])
    assert (len(example.tokens), report.truncated) == (64, 1)
    with pytest.raises(DataError, match="but max_length is 32; raise it"):
        Renderer(tokenizer, 32, context=64).render_all([row])


def test_rows_can_be_left_out_and_are_counted(tokenizer):
    rows = [Row({"text": "x" * n}, f"f:{n}") for n in (5, 300, 7)] + [Row({"prompt": "x", "completion": ""}, "f:9")]
    examples, report = Renderer(tokenizer, 256, "skip", "skip").render_all(rows)
    assert report.to_dict()["skipped"] == {"too_long": 1, "empty": 1}
    assert (report.rows, report.kept, report.tokens, report.trained) == (4, 2, 14, 12)
    examples, report = Renderer(tokenizer, 256, "truncate", "skip").render_all(rows)
    assert (report.truncated, max(len(e.tokens) for e in examples)) == (1, 256)
    with pytest.raises(DataError, match="every row was skipped"):
        Renderer(tokenizer, 256, "skip", "skip").render_all(rows[1:2])


def test_template_that_masks_everything_is_an_error(tokenizer):
    silent = build_tokenizer(256)
    silent.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"has no \{% generation %\} block, so no token would be trained"):
        Renderer(silent, 256).render(Row({"messages": CHAT}, "f:1"))
    silent.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        Renderer(silent, 256).render(Row({"messages": CHAT}, "f:1"))


def test_questions_and_answers_of_rows():
    row = Row({"messages": CHAT}, "f:1")
    assert split_answer(row) == (CHAT[:-1], "Goodbye, naïve café.")
    assert user_text(row) == "Bye."
    assert split_answer(Row({"prompt": "p", "completion": "c"}, "f:1")) == ("p", "c")
    assert user_text(Row({"text": "t"}, "f:1")) == "t"
    for data in ({"text": "x"}, {"messages": CHAT[:2]}):
        with pytest.raises(DataError, match="f:1"):
            split_answer(Row(data, "f:1"))


def examples_of(lengths: list[int]) -> list[Example]:
    rng = random.Random(0)
    tokens = [[rng.randrange(256) for _ in range(n)] for n in lengths]
    return [Example(t, list(t)) for t in tokens]


def test_packing_keeps_every_document_once_and_fills_rows():
    rng = random.Random(1)
    lengths = [rng.randint(2, 60) for _ in range(300)]
    examples = examples_of(lengths)
    packed = pack(examples, 128)
    assert all(len(row.tokens) <= 128 for row in packed)
    starts = [(row, i) for row in packed for i, p in enumerate(row.positions) if p == 0]
    documents = []
    for row, start in starts:
        stop = next((i for i in range(start + 1, len(row.tokens)) if row.positions[i] == 0), len(row.tokens))
        documents.append(tuple(row.tokens[start:stop]))
    assert sorted(documents) == sorted(tuple(e.tokens) for e in examples)
    assert sum(lengths) / (128 * len(packed)) > 0.97
    assert pack(examples, 128) == packed


def test_packed_documents_do_not_see_each_other(base):
    model = tiny.load_merged(base, None)
    examples = examples_of([9, 5, 14, 3])
    batch = Collator(pad=258)([concatenate(examples[:2]), concatenate(examples[2:])])
    with torch.inference_mode():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, column, example in ((0, 0, 0), (0, 9, 1), (1, 0, 2), (1, 14, 3)):
            ids = torch.tensor([examples[example].tokens])
            got = packed[row, column : column + ids.shape[1]]
            torch.testing.assert_close(got, model(ids).logits[0], rtol=1e-4, atol=1e-4)


def test_loss_of_a_packed_row_is_that_of_its_documents(base):
    model = tiny.load_merged(base, None)
    examples = examples_of([9, 5, 14])
    collate = Collator(pad=258)
    with torch.inference_mode():
        together = model(**collate([concatenate(examples)]), use_cache=False).loss
        alone_ = [(model(**collate([alone(e)])).loss, len(e.tokens) - 1) for e in examples]
    expected = sum(loss * n for loss, n in alone_) / sum(n for _, n in alone_)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(base):
    model = tiny.load_merged(base, None)
    examples = [alone(e) for e in examples_of([4, 11])]
    batch = Collator(pad=258)(examples)
    assert batch["labels"][0].tolist()[4:] == [IGNORED] * 7
    with torch.inference_mode():
        got = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0, :4]
        expected = model(torch.tensor([examples[0].tokens])).logits[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_padding_asks_for_no_position_that_no_document_has():
    rows = [concatenate(examples_of([9, 9, 9])), concatenate(examples_of([2, 8]))]
    positions = Collator(pad=258)(rows)["position_ids"]
    assert positions.max() == 8
    assert positions[1].tolist() == [0, 1, *range(8), 8, *range(9), *range(7)]
