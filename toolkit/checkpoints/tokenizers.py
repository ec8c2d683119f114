"""Tokenizers as files: the vocabulary of a `tokenizer.json`, and one with further tokens; without transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoints.reader import read_json
from toolkit.checkpoints.writer import write_text
from toolkit.errors import CheckpointError, MissingError

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

RENAMED = 0.01
"""Share of its tokens that a fine-tune may have renamed, as chat models do with reserved ones."""


@dataclass(frozen=True)
class TokenizerFile:
    """A `tokenizer.json` of the tokenizers library.

    Attributes:
        folder: it came from.
        data: its content.
        config: of the `tokenizer_config.json` beside it, empty where there is none.
    """

    folder: Path
    data: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of every token, those of the model and those that were added."""
        known = self.data["model"].get("vocab", {})
        if not isinstance(known, Mapping):  # Unigram: a list of (token, score)
            known = {token: index for index, (token, _) in enumerate(known)}
        return {**known, **{token["content"]: token["id"] for token in self.added}}

    @property
    def added(self) -> Sequence[Mapping[str, Any]]:
        """Tokens that were added to the model's, with their settings."""
        return self.data.get("added_tokens") or ()

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.vocabulary.values(), default=-1) + 1

    def extended(self, tokens: Sequence[Mapping[str, Any]]) -> TokenizerFile:
        """Return it with further tokens, entries of `added_tokens`, at the end; their ids are given here."""
        data, config = copy.deepcopy(dict(self.data)), copy.deepcopy(dict(self.config))
        numbered = [{**token, "id": self.size + i} for i, token in enumerate(tokens)]
        data["added_tokens"] = [*self.added, *numbered]
        if "added_tokens_decoder" in config:
            settings = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
            config["added_tokens_decoder"] |= {str(t["id"]): {k: t[k] for k in settings} for t in numbered}
        return TokenizerFile(self.folder, data, config)

    @property
    def chat_template(self) -> str | None:
        """The chat template, wherever it is kept."""
        if (self.folder / TEMPLATE).is_file():
            return (self.folder / TEMPLATE).read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several by name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        return template


def plain_token(content: str) -> dict[str, Any]:
    """Return the settings of a token that is found as it is written."""
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": -1, "content": content, **off}


def read_tokenizer(folder: Path | None, source: str) -> TokenizerFile:
    """Read the tokenizer of a model's folder.

    Raises:
        MissingError: no `tokenizer.json` there.
        CheckpointError: not a tokenizer's file.
    """
    if folder is None or not (folder / FILE).is_file():
        raise MissingError(f"{source}: no {FILE}; load the tokenizer with transformers and save it to get one")
    data = read_json(folder / FILE)
    if not isinstance(data.get("model"), Mapping):
        raise CheckpointError(f"{folder / FILE}: not a tokenizer (it has no model)")
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return TokenizerFile(folder, data, config)


def other_tokens(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    """Say how many ids of a vocabulary mean other tokens in `ours`, where they are more than a fine-tune renames."""
    by_id = {index: token for token, index in ours.items()}
    other = sum(by_id.get(index, token) != token for token, index in theirs.items())
    return f"{other} of {len(theirs)} tokens have ids that mean other tokens" if other > RENAMED * len(by_id) else None


def other_tokens_of(folder: Path | None, other: Path | None) -> str | None:
    """Do the same for the tokenizers of two models; `None` where a folder has none that can be read."""
    files = [place / FILE for place in (folder, other) if place and (place / FILE).is_file()]
    if len(files) < 2 or files[0] == files[1] or files[0].read_bytes() == files[1].read_bytes():
        return None
    try:
        ours, theirs = (read_tokenizer(file.parent, str(file.parent)).vocabulary for file in files)
    except CheckpointError:
        return None
    return other_tokens(ours, theirs)


def write_tokenizer(out: Path, tokenizer: TokenizerFile | None, template: str | None) -> None:
    """Put another tokenizer, or another chat template, into a folder that has a copy of the donor's files."""
    if tokenizer is not None:
        for stale in ("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model", "*.tiktoken"):
            for path in out.glob(stale):  # they would contradict the new tokenizer.json
                path.unlink()
        write_text(out / FILE, json.dumps(tokenizer.data, ensure_ascii=False, indent=2) + "\n")
        if tokenizer.config:
            write_text(out / CONFIG, json.dumps(tokenizer.config, ensure_ascii=False, indent=2) + "\n")
        template = template or tokenizer.chat_template
    if template is None:
        return
    if (out / CONFIG).is_file():
        config = read_json(out / CONFIG)
        if config.pop("chat_template", None) is not None:
            write_text(out / CONFIG, json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    write_text(out / TEMPLATE, template)
