"""The chat template of an output: one that the spec holds, one of this folder by name, or what most models have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from toolkit.checkpoints.tokenizers import read_tokenizer
from toolkit.errors import MissingError, Problem
from toolkit.merge.inputs import Inputs
from toolkit.merge.spec import MergeSpec
from toolkit.names import did_you_mean

FOLDER = Path(__file__).parent


def chat_template(spec: MergeSpec, inputs: Inputs) -> tuple[str | None, list[Problem]]:
    """Return the template that a spec asks for, `None` where it asks for none, and what is wrong."""
    wanted = spec.chat_template
    if wanted is None or "{%" in wanted or "{{" in wanted:
        return wanted, []
    if wanted == "auto":
        return _usual(inputs), []
    known = {path.stem: path for path in sorted(FOLDER.glob("*.jinja"))}
    if wanted in known:
        return known[wanted].read_text(encoding="utf-8"), []
    hint = did_you_mean(wanted, [*known, "auto"]) or f" (known: {', '.join(known)}, auto)"
    return None, [Problem("chat_template", f"{wanted!r} is neither a template nor the name of one{hint}")]


def _usual(inputs: Inputs) -> str | None:
    """Return the template that most models have; of equally many, the earliest model's."""
    found: Counter[str] = Counter()
    for folder in dict.fromkeys(model.weights.folder for model in inputs.models):
        try:
            template = read_tokenizer(folder, str(folder)).chat_template
        except MissingError:
            continue
        if template:
            found[template.strip()] += 1
    return found.most_common(1)[0][0] if found else None
