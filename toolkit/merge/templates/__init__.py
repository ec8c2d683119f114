"""The chat template of an output: one that the spec holds, one of this folder by name, or what most models have."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from toolkit.checkpoints.tokenizers import read_tokenizer
from toolkit.errors import MissingError, Problem
from toolkit.merge.inputs import Inputs
from toolkit.merge.spec import MergeSpec
from toolkit.names import did_you_mean

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
        text: in Jinja.
        origin: where it comes from: a model, a file of this folder, or the spec.
    """

    text: str
    origin: str


def chat_template(spec: MergeSpec, inputs: Inputs) -> tuple[Template | None, list[Problem]]:
    """Return the template that a spec asks for, `None` where it asks for none, and what is wrong."""
    wanted = spec.chat_template
    if wanted is None:
        return None, []
    if "{%" in wanted or "{{" in wanted:
        return Template(wanted, "the spec"), []
    if wanted == "auto":
        return _usual(inputs), []
    known = {path.stem: path for path in sorted(FOLDER.glob("*.jinja"))}
    if wanted in known:
        return Template(known[wanted].read_text(encoding="utf-8"), wanted), []
    hint = did_you_mean(wanted, [*known, "auto"]) or f" (known: {', '.join(known)}, auto)"
    return None, [Problem("chat_template", f"{wanted!r} is neither a template nor the name of one{hint}")]


def _usual(inputs: Inputs) -> Template | None:
    """Return the template that most models have; of equally many, the earliest model's."""
    found: Counter[str] = Counter()
    origins: dict[str, str] = {}
    folders: dict[Path | None, str] = {}
    for model in inputs.models:
        folders.setdefault(model.weights.folder, model.weights.source)
    for folder, source in folders.items():
        try:
            template = read_tokenizer(folder, str(folder)).chat_template
        except MissingError:
            continue
        if template:
            found[template.strip()] += 1
            origins.setdefault(template.strip(), source)
    return next((Template(text, origins[text]) for text, _ in found.most_common(1)), None)
