"""Answer prompts with a large model that small experts steer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import names, specs
from toolkit.checkpoints.writer import check_free, staged, write_text
from toolkit.data.rows import Row, read_rows, split_answer, user_text
from toolkit.errors import Problem, RequestError, SpecError, UnsupportedError
from toolkit.evaluation.metrics import exact_match, percent
from toolkit.models.modes import evaluating
from toolkit.progress import track
from toolkit.routing.cascade import Completion
from toolkit.routing.fit import parameters
from toolkit.routing.fusion.arithmetic import fused
from toolkit.routing.fusion.models import Reader, load_all
from toolkit.routing.fusion.spec import FusionSpec
from toolkit.tables import Cell, Report, Table

if TYPE_CHECKING:
    from torch import Generator, Tensor

METHODS = "toolkit.routing.fusion.methods"
Prompt = str | Sequence[Mapping[str, Any]]
"""What a user asks, or chat messages."""


@dataclass(frozen=True)
class FusedAnswer:
    """An answer, and what steered it.

    Attributes:
        text: of the answer, without the end token.
        tokens: its ids; the end token is one where the answer ended by itself.
        logprobs: of the tokens, natural logarithms, as the fused logits give them at temperature 1.
        weights: of each expert, by token.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    weights: list[dict[str, float]]


@dataclass(frozen=True)
class FusionResult(Report):
    """Answers to prompts, in order."""

    answers: Sequence[FusedAnswer] = field(default_factory=tuple)


class FusedModel:
    """A large model with its experts; also a model for `Cascade`.

    Args:
        spec: models and method, as a YAML file, a dict or a `FusionSpec`.

    Raises:
        SpecError: the spec is wrong, or the models do not share a vocabulary.
    """

    def __init__(self, spec: specs.Source | FusionSpec) -> None:
        self.spec = specs.load(spec, FusionSpec)
        self.method, self.parameters = _method(self.spec)
        self.large, self.base, self.experts = load_all(self.spec)
        self.name = f"{self.large.source} with {', '.join(self.spec.experts)}"

    def __call__(self, prompt: str) -> Completion:
        """Answer one prompt, as a model of a cascade does."""
        answer = self.answer(prompt)
        return Completion(answer.text, tuple(answer.logprobs))

    def answer(self, prompt: Prompt) -> FusedAnswer:
        """Answer one prompt.

        Raises:
            RequestError: the prompt is empty, or chat messages without a chat template.
        """
        import torch

        spec, start = self.spec, self._encode(prompt)
        models = [one.model for one in (self.large, self.base, *self.experts)]
        steering, generator = Steering(self), torch.Generator().manual_seed(spec.seed)
        tokens: list[int] = []
        logprobs: list[float] = []
        with ExitStack() as modes, torch.inference_mode():
            for model in models:
                modes.enter_context(evaluating(model))
            while len(tokens) < spec.max_tokens and (not tokens or tokens[-1] not in self._ends):
                logits = steering(torch.tensor([start + tokens], device=self.large.model.device)).cpu()
                tokens.append(_pick(logits, spec, generator))
                logprobs.append(float(logits.log_softmax(-1)[tokens[-1]]))
        text = self.large.tokenizer.decode(tokens, skip_special_tokens=True)
        return FusedAnswer(text, tokens, logprobs, steering.weights)

    @property
    def _ends(self) -> set[int]:
        """Tokens that end an answer: those of the large model's generation config and its tokenizer's own."""
        named = getattr(getattr(self.large.model, "generation_config", None), "eos_token_id", None)
        found = [*(named if isinstance(named, list) else [named]), self.large.tokenizer.eos_token_id]
        return {token for token in found if token is not None}

    def _encode(self, prompt: Prompt) -> list[int]:
        tokenizer = self.large.tokenizer
        if isinstance(prompt, str) and not (self.spec.chat and tokenizer.chat_template):
            ids = tokenizer.encode(prompt)
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if not tokenizer.chat_template:
                raise RequestError("chat messages, but the large model's tokenizer has no chat template")
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if not ids:
            raise RequestError("the prompt is empty")
        return list(ids)


class Steering:
    """The fused logits of one sequence, which all models read with caches of their own.

    Args:
        fusion: the models and the method.
    """

    def __init__(self, fusion: FusedModel) -> None:
        self.fusion = fusion
        self.readers = [Reader(one.model) for one in (fusion.large, fusion.base, *fusion.experts)]
        self.weights: list[dict[str, float]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the logits of the next token after ids `[1, L]`, `[V]` float32, of the tokens that all models have."""
        import torch

        found = [reader(ids) for reader in self.readers]
        # Models of one family pad their vocabularies to different widths.
        width = min(logits.shape[1] for logits in found)
        large, base, *experts = [logits[:, :width] for logits in found]
        tuned, known = torch.stack(experts), list(self.fusion.spec.experts)
        alpha = self.fusion.method.weights(large, base, tuned, known, self.fusion.parameters)
        self.weights.append(dict(zip(known, alpha[0].tolist(), strict=True)))
        return fused(large, tuned - base, alpha)[0]


def _pick(logits: Tensor, spec: FusionSpec, generator: Generator) -> int:
    """Choose a token by logits `[V]`; of equally likely ones the first."""
    import torch

    if spec.temperature == 0:
        return int(logits.argmax())
    shares, order = (logits / spec.temperature).softmax(-1).sort(descending=True, stable=True)
    # The likeliest tokens that together reach `top_p`.
    shares = shares.masked_fill(shares.cumsum(-1) - shares >= spec.top_p, 0)
    return int(order[torch.multinomial(shares, 1, generator=generator)])


def _method(spec: FusionSpec) -> tuple[Any, Any]:
    """Return the module of the method and its checked parameters."""
    try:
        module = names.load(METHODS, spec.method, "fusion method")
    except UnsupportedError as error:
        raise spec.error([Problem("method", str(error))]) from None
    try:
        params = parameters(module, spec.parameters)
        module.check(list(spec.experts), params)
    except SpecError as error:
        found = [p.where if p.where.startswith("parameters") else f"parameters.{p.where}" for p in error.problems]
        raise spec.error([Problem(w, p.message) for w, p in zip(found, error.problems, strict=True)]) from None
    return module, params


def fuse_logits(
    spec: specs.Source | FusionSpec,
    out: str | Path | None = None,
    *,
    prompts: Sequence[Prompt] = (),
    overrides: Sequence[str] = (),
    smoke: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> FusionResult:
    """Answer prompts with a large model that small experts steer at every step.

    Args:
        spec: a YAML file, a dict or a `FusionSpec`.
        out: folder to write `answers.json` in, instead of the spec's own.
        prompts: what is asked, instead of the spec's own prompts.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.
        overwrite: replace `out` if it exists.
        quiet: show no progress.

    Raises:
        SpecError: the spec is wrong, or the models do not share a vocabulary.
        DataError: a row without a prompt.
        RequestError: a prompt that cannot be answered.
        OutputError: `out` exists.
    """
    loaded = specs.load(spec, FusionSpec, overrides=overrides, smoke=smoke)
    folder = out or loaded.out
    if folder:
        check_free(Path(folder), overwrite=overwrite)
    if not prompts and loaded.prompts is None:
        raise loaded.error([Problem("prompts", "nothing is asked; name files of prompts, or give a prompt")])
    rows = [] if prompts else read_rows(loaded.prompts or [])[: loaded.limit]
    asked = [_asked(row) for row in rows] or [(prompt, None) for prompt in prompts]
    model = FusedModel(loaded)
    answers = []
    with track("answering", len(asked), unit="prompts", quiet=quiet) as progress:
        for prompt, _ in asked:
            answers.append(model.answer(prompt))
            progress.advance()
    result = _result(loaded, answers, [expected for _, expected in asked])
    if folder:
        with staged(Path(folder), overwrite=overwrite) as partial:
            text = json.dumps({**result.numbers, "answers": [asdict(answer) for answer in answers]}, indent=2)
            write_text(partial / "answers.json", text + "\n")
    return result


def _asked(row: Row) -> tuple[Prompt, str | None]:
    """Return the prompt of a row, and the answer that it wants where it has one."""
    if "completion" in row.data or "messages" in row.data:
        return split_answer(row)
    return user_text(row), None


def _result(spec: FusionSpec, answers: Sequence[FusedAnswer], expected: Sequence[str | None]) -> FusionResult:
    steps = [step for answer in answers for step in answer.weights]
    mean = {name: sum(step[name] for step in steps) / max(1, len(steps)) for name in spec.experts}
    numbers: dict[str, Any] = {"answers": [answer.text for answer in answers], "weights": mean, "tokens": len(steps)}
    known = [(a.text, wanted) for a, wanted in zip(answers, expected, strict=True) if wanted is not None]
    if known:
        numbers["right"] = percent(exact_match(*map(list, zip(*known, strict=True))))
    rows: list[list[Cell]] = [[answer.text, len(answer.tokens)] for answer in answers]
    title = f"{spec.method}" + (f"; {numbers['right']:.1f} percent right" if known else "")
    tables = [Table(("answer", "tokens"), rows, title)]
    tables.append(Table(("expert", "mean weight"), [[n, w] for n, w in mean.items()], "over all tokens", digits=3))
    return FusionResult(numbers, tables, tuple(answers))
