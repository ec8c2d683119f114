"""What a training run would do, before it does it: its rows as they are trained, and its cost."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from math import ceil
from typing import TYPE_CHECKING, Any

from toolkit import specs
from toolkit.adapters.config import faults
from toolkit.adapters.records import as_text
from toolkit.adapters.spec import TrainSpec
from toolkit.data.render import IGNORED, Example, Renderer
from toolkit.data.rows import read_source
from toolkit.models.load import LoadedModel, load_tokenizer, quiet_transformers
from toolkit.tables import Report, Table, human_bytes

if TYPE_CHECKING:
    from rich.text import Text

    from toolkit.adapters.parts import Parts
    from toolkit.data.tokenizer import Tokenizer


def plan_training(spec: specs.Source | TrainSpec, *, overrides: Sequence[str] = (), smoke: bool = False) -> Report:
    """Tell what a run would cost: rows, tokens, steps, trained parameters, and memory by part.

    The model is loaded and the data rendered as for the run itself, so what would stop it stops this; nothing is
    trained or written. Activations are measured on short rows, and follow a line from there.

    Args:
        spec: a YAML file, a dict or a `TrainSpec`.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.

    Raises:
        As `train`.
    """
    loaded = specs.load(spec, TrainSpec, overrides=overrides, smoke=smoke)
    found = faults(loaded)
    if found:
        raise loaded.error(found)
    from toolkit.adapters.parts import parts_of
    from toolkit.adapters.trainee import trainee

    parts = parts_of(loaded)
    parts.objective.survey()
    with quiet_transformers(), trainee(loaded, parts) as model:
        return _planned(loaded, model, parts)


def _planned(spec: TrainSpec, loaded: LoadedModel, parts: Parts) -> Report:
    from toolkit.adapters.dataset import train_set
    from toolkit.adapters.loader import order_of
    from toolkit.adapters.memory import memory_parts
    from toolkit.adapters.trainer import collator

    trained = train_set(spec, loaded, parts)
    t = spec.training
    order = order_of(spec, trained.rows)
    per_epoch = ceil(len(order) / t.gradient_accumulation_steps)
    steps = t.max_steps or ceil(t.num_epochs * per_epoch)
    tokens = trained.tokens * (steps * t.batch_size * t.gradient_accumulation_steps if trained.stream else 0)
    longest = max(len(row.tokens) for row in trained.rows)
    virtual = getattr(getattr(loaded.model, "peft_config", {}).get("default"), "num_virtual_tokens", None) or 0
    size = max(len(batch) * max(len(trained.rows[i].tokens) for i in batch) for batch in order.together())
    memory = memory_parts(spec, loaded, collator(spec, loaded) if parts.objective.packs else None, size)
    parameters = list(loaded.model.parameters())
    numbers = {
        "steps": steps,
        "steps_per_epoch": per_epoch,
        "tokens": round(tokens or trained.report["tokens"] * steps / per_epoch),
        "longest_row": longest + virtual,
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
        "data": trained.report,
        "memory": memory,
    }
    plain = [[key.replace("_", " "), as_text(v)] for key, v in numbers.items() if not isinstance(v, dict)]
    data = [[key.replace("_", " "), as_text(v)] for key, v in trained.report.items() if not isinstance(v, dict)]
    known = sum(v for v in memory.values() if v is not None)
    bytes_ = [[name, "-" if v is None else human_bytes(v)] for name, v in [*memory.items(), ("together", known)]]
    tables = [Table(("run", ""), plain), Table(("data", "one epoch"), data), Table(("memory", ""), bytes_)]
    return Report(numbers, tables)


@dataclass(frozen=True)
class Preview(Report):
    """Rows as they are trained: what the loss is over stands out."""

    def texts(self, *, marks: bool = False) -> list[Text]:
        """Return every row for a terminal.

        Args:
            marks: put trained pieces between `[[` and `]]`, for where colours do not show.
        """
        from rich.text import Text

        shown = []
        for row in self.numbers["rows"]:
            text = Text(f"{row['place']}: {row['trained']} of {row['tokens']} tokens trained\n", style="bold")
            for piece, trained in row["pieces"]:
                piece = f"[[{piece}]]" if marks and trained else piece
                text.append(piece, style="black on green" if trained else "not bold dim")
            shown.append(text)
        return shown

    def _repr_html_(self) -> str:
        def spans(pieces: list[tuple[str, bool]]) -> str:
            styles = ("opacity:.6", "background:#9fd8b4;color:black")
            return "".join(f'<span style="{styles[t]}">{html.escape(piece)}</span>' for piece, t in pieces)

        return "".join(f"<p>{html.escape(r['place'])}</p><pre>{spans(r['pieces'])}</pre>" for r in self.numbers["rows"])


def preview(
    spec: specs.Source | TrainSpec, count: int, *, overrides: Sequence[str] = (), smoke: bool = False
) -> Preview:
    """Show the first rows of each source as the model would get them, and which of their tokens are trained.

    Args:
        spec: a YAML file, a dict or a `TrainSpec`.
        count: rows of each source.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.

    Raises:
        As `train`.
    """
    from toolkit.adapters.parts import parts_of

    loaded = specs.load(spec, TrainSpec, overrides=overrides, smoke=smoke)
    base: Any = loaded.base
    tokenizer: Any = base[1] if isinstance(base, tuple) else getattr(base, "tokenizer", None)
    if tokenizer is None:
        tokenizer = load_tokenizer(str(base), trust_remote_code=loaded.trust_remote_code)
    objective = parts_of(loaded).objective
    inputs, whole = loaded.data.train_on_inputs, objective.whole
    render = Renderer(tokenizer, tokenizer.model_max_length, train_on_inputs=inputs, whole=whole)
    rows = []
    for source in loaded.data.sources():
        read = read_source(source.path, split=source.split, subset=source.subset, fields=source.fields)
        texts = (text for row in islice(read, count) for text in objective.texts(row))
        rows += [_shown(text.place, render.render(text), tokenizer) for text in texts]
    return Preview({"rows": rows})


def _shown(place: str, example: Example, tokenizer: Tokenizer) -> dict[str, object]:
    """Cut a row into pieces that are trained or not; no token predicts the first."""
    marked = zip(example.tokens, [IGNORED, *example.labels[1:]], strict=True)
    pieces = [
        (tokenizer.decode([token for token, _ in group]), trained)
        for trained, group in groupby(marked, key=lambda pair: pair[1] != IGNORED)
    ]
    return {"place": place, "tokens": len(example.tokens), "trained": example.num_trained, "pieces": pieces}
