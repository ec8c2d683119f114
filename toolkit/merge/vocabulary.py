"""One vocabulary for models that have different ones: embeddings and heads, row by row, in the order of the output.

A token that a model lacks gets, in that model, the row that the spec names; else that of the one model that has it, or
of the base; else the mean over the models that have it; and zeros where none does. So a merge in which a model has
nothing to say about a token leaves that token to the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from toolkit.checkpoints.deltas import CHUNK
from toolkit.checkpoints.dtypes import Bytes, Floats, encode
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.layout import INPUT_EMBEDDINGS, OUTPUT_HEADS
from toolkit.checkpoints.reader import Checkpoint
from toolkit.checkpoints.tokenizers import TokenizerFile, plain_token, read_tokenizer
from toolkit.checkpoints.view import CheckpointView
from toolkit.errors import Problem, ToolkitError
from toolkit.merge.inputs import Inputs
from toolkit.merge.spec import MergeSpec, TokenRow, TokenSpec

TOKENIZER_BLOCK = "a tokenizer block merges models token by token"
"""What to do about models whose vocabularies differ."""

Row = tuple[int, int]
"""Position of a model, and a row of its embeddings."""


@dataclass(frozen=True)
class Vocabulary:
    """What the output's tokens are, and where their rows come from.

    Attributes:
        tokenizer: of the output.
        origin: the model whose tokenizer it begins with.
        added: tokens that were added to that one's, in the order of their ids.
        rows: of every model, `[size]`: its own row of each output row, or -1.
        default: output row -> rows whose mean stands in where a model has none (of none: zeros); a row that is not
            in it fills up.
        forced: output rows that are the default in every model.
    """

    tokenizer: TokenizerFile
    origin: str
    added: Sequence[str]
    rows: Sequence[NDArray[np.int64]]
    default: Mapping[int, Sequence[Row]]
    forced: frozenset[int]

    @property
    def size(self) -> int:
        """Rows of the output's embeddings."""
        return len(self.rows[0])


class VocabularyView(CheckpointView):
    """A model as it looks with the output's vocabulary; only rows are moved, and nothing is kept in memory.

    Args:
        inner: the model.
        position: of the model in `vocabulary.rows`.
        vocabulary: of the output.
        all_models: in the order of the positions, for the rows that this one lacks.
    """

    def __init__(
        self, inner: Checkpoint, position: int, vocabulary: Vocabulary, all_models: Sequence[Checkpoint]
    ) -> None:
        super().__init__(inner)
        self.position, self.vocabulary, self.all_models = position, vocabulary, all_models
        self.mapped = {name for name in inner.tensors if has_vocabulary(name)}
        self.tensors = {name: self._resized(info) for name, info in inner.tensors.items()}
        self._means: dict[str, Floats] = {}

    def _resized(self, info: TensorInfo) -> TensorInfo:
        if info.name not in self.mapped:
            return info
        return replace(info, shape=(self.vocabulary.size, *info.shape[1:]))

    @override
    def is_stored(self, name: str) -> bool:
        return self._stored(name) not in self.mapped and super().is_stored(name)

    @override
    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        if self._stored(name) not in self.mapped:
            return super().read_raw(name, start, stop)
        info = self.info(name)
        values = np.empty((info.count if stop is None else stop) - start, np.float32)
        self.read(name, start, start + len(values), values)
        return encode(values, info.dtype)

    @override
    def read(self, name: str, start: int, stop: int, out: Floats) -> None:
        if self._stored(name) not in self.mapped:
            super().read(name, start, stop, out)
            return
        width = int(np.prod(self.info(name).shape[1:]))
        first, last = start // width, -(-stop // width)
        rows = np.empty((last - first, width), np.float32)
        self._read_rows(name, first, last, rows)
        out[:] = rows.reshape(-1)[start - first * width : stop - first * width]

    def _read_rows(self, name: str, first: int, last: int, out: Floats) -> None:
        own = self.vocabulary.rows[self.position]
        for begin, end in _runs(own[first:last]):
            source = int(own[first + begin])
            if source >= 0:
                self._read_own(name, source, end - begin, out[begin:end])
        for row in range(first, last):
            if own[row] < 0 or row in self.vocabulary.forced:
                self._read_default(name, row, out[row - first])

    def _read_own(self, name: str, row: int, count: int, out: Floats) -> None:
        width = out.shape[1]
        self.inner.read(name, row * width, (row + count) * width, out.reshape(-1))

    def _read_default(self, name: str, row: int, out: Floats) -> None:
        rows = self.vocabulary.default.get(row)
        if rows is None:
            out[:] = self._mean_row(name, len(out))
            return
        total = np.zeros(len(out))
        for model, source in rows:
            values = np.empty_like(out)
            self.all_models[model].read(name, source * len(out), (source + 1) * len(out), values)
            total += values
        out[:] = total / max(1, len(rows))

    def _mean_row(self, name: str, width: int) -> Floats:
        if name not in self._means:
            total, count = np.zeros(width), self.inner.info(name).count
            step = max(1, CHUNK // width) * width
            for start in range(0, count, step):
                values = np.empty(min(step, count - start), np.float32)
                self.inner.read(name, start, start + len(values), values)
                total += values.reshape(-1, width).sum(axis=0, dtype=np.float64)
            self._means[name] = (total / (count // width)).astype(np.float32)
        return self._means[name]


def has_vocabulary(name: str) -> bool:
    """Tell whether a tensor has one row per token."""
    return name.endswith((*INPUT_EMBEDDINGS, *OUTPUT_HEADS, "lm_head.bias"))


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield ranges in which the rows follow each other, or are all missing."""
    step = np.diff(rows)
    joined = (step == 1) & (rows[:-1] >= 0) | ((rows[:-1] < 0) & (rows[1:] < 0))
    edges = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(rows)]
    yield from pairwise(edges)


def unify(spec: MergeSpec, inputs: Inputs) -> tuple[Inputs, Vocabulary | None, list[Problem]]:
    """Give every model the output's vocabulary, where the spec asks for it.

    Returns:
        The inputs with their models as views, the vocabulary (`None` where the spec has no tokenizer block), and what
        is wrong.
    """
    if spec.wanted_tokenizer is None:
        return inputs, None, []
    models = _distinct(inputs)
    builder = _Builder(spec, models, inputs.donor)
    vocabulary = builder.build()
    if vocabulary is None:
        return inputs, None, builder.problems
    views = {id(m): VocabularyView(m, i, vocabulary, models) for i, m in enumerate(models)}
    groups = []
    for group in inputs.groups:
        base = views[id(group.base)] if group.base else None
        viewed = [
            replace(m, weights=views[id(m.weights)], mapped=frozenset(views[id(m.weights)].mapped))
            for m in group.models
        ]
        groups.append(replace(group, base=base, models=viewed))
    return Inputs(groups), vocabulary, []


def _distinct(inputs: Inputs) -> list[Checkpoint]:
    """List the opened models once each, the donor first."""
    found: dict[int, Checkpoint] = {id(inputs.donor): inputs.donor}
    for group in inputs.groups:
        for model in (*([group.base] if group.base else []), *(m.weights for m in group.models)):
            found.setdefault(id(model), model)
    return list(found.values())


class _Builder:
    def __init__(self, spec: MergeSpec, models: Sequence[Checkpoint], donor: Checkpoint) -> None:
        self.spec, self.models, self.donor = spec, models, donor
        self.block = spec.wanted_tokenizer
        self.key = "tokenizer_source" if spec.tokenizer_source else "tokenizer.source"
        self.problems: list[Problem] = []
        self.files: list[TokenizerFile] = []
        self.known: list[dict[str, int]] = []

    def build(self) -> Vocabulary | None:
        assert self.block is not None
        for model in self.models:
            try:
                self.files.append(read_tokenizer(model.folder, model.source))
                self.known.append(self.files[-1].vocabulary)
            except ToolkitError as error:
                self.problems.append(Problem(self.key, str(error)))
        if self.problems or (origin := self._origin(self.block.source)) is None:
            return None
        tokenizer = self._tokenizer(origin)
        vocabulary = tokenizer.vocabulary
        size = self._size(tokenizer, origin)
        rows = [self._rows(i, vocabulary, size, i == origin) for i in range(len(self.models))]
        default = {row: [(origin, row)] for row in range(self._num_rows(self.models[origin]))}
        default |= {row: self._default(token) for token, row in vocabulary.items()}
        forced = frozenset(vocabulary[token] for token, own in self.block.tokens.items() if own.force)
        added = [token for token in vocabulary if token not in self.known[origin]]
        source = self.models[origin].source
        return None if self.problems else Vocabulary(tokenizer, source, added, rows, default, forced)

    def _origin(self, source: str) -> int | None:
        """Return the model whose tokenizer the output's begins with."""
        if source in ("union", "base"):
            return 0
        return self._position(source, self.key)

    def _position(self, source: str, where: str) -> int | None:
        for i, model in enumerate(self.models):
            if source in (model.source, str(model.folder)):
                return i
        known = ", ".join(model.source for model in self.models)
        self.problems.append(Problem(where, f"{source} is no model of this merge (they are {known})"))
        return None

    def _tokenizer(self, origin: int) -> TokenizerFile:
        assert self.block is not None
        start = self.files[origin]
        new: dict[str, dict[str, Any]] = {}
        if self.block.source == "union":
            for model, file, known in zip(self.models, self.files, self.known, strict=True):
                settings = {token["content"]: token for token in file.added}
                for token, row in known.items():
                    if row < self._num_rows(model):
                        new.setdefault(token, dict(settings.get(token, plain_token(token))))
        for token in self.block.tokens:
            new.setdefault(token, plain_token(token))
        missing = [settings for token, settings in new.items() if token not in self.known[origin]]
        return start.extended(missing) if missing else start

    @staticmethod
    def _num_rows(model: Checkpoint) -> int:
        return max((info.shape[0] for name, info in model.tensors.items() if has_vocabulary(name)), default=0)

    def _size(self, tokenizer: TokenizerFile, origin: int) -> int:
        """Return the rows of the output: at least those that the tokenizer's own model has, unused ones included."""
        assert self.block is not None
        multiple = self.block.pad_to_multiple_of or 1
        return -(-max(tokenizer.size, self._num_rows(self.models[origin])) // multiple) * multiple

    def _rows(self, position: int, vocabulary: Mapping[str, int], size: int, is_origin: bool) -> NDArray[np.int64]:
        """Return a model's own row for each row of the output; the origin's without a token keep their numbers."""
        available = self._num_rows(self.models[position])
        rows = np.full(size, -1, np.int64)
        if is_origin:
            rows[:available] = np.arange(available)
        for token, row in vocabulary.items():
            own = self.known[position].get(token, available)
            rows[row] = own if own < available else -1
        return rows

    def _default(self, token: str) -> list[Row]:
        assert self.block is not None
        given = self.block.tokens.get(token)
        if given is not None and given.source is not None:
            return self._given(token, given)
        found = ((i, known.get(token)) for i, known in enumerate(self.known))
        having = [(i, row) for i, row in found if row is not None and row < self._num_rows(self.models[i])]
        if self.spec.base_model is not None and any(i == 0 for i, _ in having):
            return [row for row in having if row[0] == 0]
        return having

    def _given(self, token: str, given: TokenSpec) -> list[Row]:
        where = f"tokenizer.tokens.{token}.source"
        source = given.source if isinstance(given.source, TokenRow) else None
        if source is not None and source.kind == "zero":
            return []
        position = self._position(str(source.model if source else given.source), where)
        if position is None:
            return []
        wanted = token if source is None or source.token is None else source.token
        row = source.token_id if source and source.token_id is not None else self.known[position].get(wanted)
        rows = self._num_rows(self.models[position])
        if row is None or row >= rows:
            what = f"no token {wanted!r}" if row is None else f"{rows} rows, not {row + 1}"
            self.problems.append(Problem(where, f"{self.models[position].source} has {what}"))
            return []
        return [(position, row)]
