"""One step on the device: its work as one flat batch through the model, out come the logits to sample from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from toolkit.errors import UnsupportedError
from toolkit.kernels.impl import Impl
from toolkit.kernels.paging import store
from toolkit.models.logits import keeps_logits
from toolkit.serving.adapters.pool import AdapterPool
from toolkit.serving.attention import NAME
from toolkit.serving.graphs import DecodeGraphs
from toolkit.serving.logprobs import note_prompt
from toolkit.serving.memory import Memory
from toolkit.serving.observe import observing
from toolkit.serving.own_pass import OwnPass
from toolkit.serving.pages import Block
from toolkit.serving.passes import Part, allowed, distance, paged_logits, slots
from toolkit.serving.request import Request
from toolkit.serving.scheduler import Work

LONGEST_PROBE = 64
"""Most tokens of the prompt that a model is tried with."""

PROBED = 2
"""Last tokens of it whose logits are compared."""


class Runner:
    """Runs steps of one model.

    Args:
        model: loaded with the attention implementation of the toolkit.
        impl: form of the operations, `None` for the device's own.

    Attributes:
        observed: what an ordinary forward pass showed of the model.
        vocabulary: rows of the input embedding, below which every id must be.
        graphs: of steps of single tokens, where they are captured.

    Raises:
        UnsupportedError: the model's attention does not go through transformers' interface.
    """

    memory: Memory
    adapters: AdapterPool
    graphs: DecodeGraphs | None = None

    def __init__(self, model: PreTrainedModel, page_size: int, impl: Impl | None = None) -> None:
        self.model, self.page_size = model, page_size
        self.impl: Impl | None = impl
        self.vocabulary = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
        self._check_config()
        self._ids = self._probe_ids()
        with observing(model, len(self._ids), PROBED) as self.observed, self._named_errors():
            self._plain = self._plain_logits(self._ids)
        self._check_layers()

    def begin(self, memory: Memory, adapters: AdapterPool) -> None:
        """Take the memory and the adapters, and answer a prompt as the engine does: it must be the model's own answer.

        Raises:
            UnsupportedError: the model does what paged attention does not.
        """
        self.memory, self.adapters = memory, adapters
        with self._named_errors():
            paged = self._paged_logits(self._ids)
        self._compare(paged, self._plain)

    def _check_config(self) -> None:
        kind, config = type(self.model).__name__, self.model.config.get_text_config()
        if getattr(self.model.config, "_attn_implementation", None) != NAME:
            raise UnsupportedError(f"{kind} cannot take another attention, so it cannot be served")
        if getattr(config, "attention_chunk_size", None):
            raise UnsupportedError(
                f"{kind} attends in chunks of {config.attention_chunk_size} tokens (attention_chunk_size), which paged"
                " attention does not know, so it cannot be served"
            )

    def _check_layers(self) -> None:
        kind, wanted = type(self.model).__name__, self.model.config.get_text_config().num_hidden_layers
        if len(self.observed.heads) != wanted:
            raise UnsupportedError(
                f"{kind}: {len(self.observed.heads)} of {wanted} layers attend through transformers'"
                " attention interface, so it cannot be served"
            )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Say of any error inside the block that the model cannot be served."""
        kind = type(self.model).__name__
        try:
            yield
        except UnsupportedError as error:
            raise UnsupportedError(f"{error}, so {kind} cannot be served") from None
        except Exception as error:  # whatever a model's own code raises
            reason = " ".join(str(error).split())[:200]
            raise UnsupportedError(f"{kind} cannot be served: {type(error).__name__}: {reason}") from error

    def _probe_ids(self) -> list[int]:
        """Return ids that fill more than a page and more than the window twice, as far as that stays cheap.

        A window beyond `LONGEST_PROBE` is not reached; a layer hands it to attention as it does a short one.
        """
        config = self.model.config.get_text_config()
        window, most = (getattr(config, n, None) for n in ("sliding_window", "max_position_embeddings"))
        spans = [self.page_size, *([window] if isinstance(window, int) else [])]
        length = min(2 * max(spans) + 3, LONGEST_PROBE, most or LONGEST_PROBE)
        return [(31 + 97 * i) % self.vocabulary for i in range(length)]

    def _paged_logits(self, ids: list[int]) -> torch.Tensor:
        """Return `[2, V]`, what follows the last two ids: a prompt in two chunks, then a token of the answer."""
        request = Request("probe", ids[:-1])
        pages = -(-len(ids) // self.page_size)
        memory, self.memory = self.memory, Memory.like(self.memory, pages)  # the engine's may be smaller
        request.blocks = [Block([page]) for page in reversed(range(pages))]
        try:
            half = len(request.prompt) // 2
            if half:
                self.run([Work(request, half)])
            _, after_prompt = self.run([Work(request, len(request.prompt) - half)])
            request.output.append(ids[-1])
            _, after_answer = self.run([Work(request, 1)])
        finally:
            self.memory = memory
        return torch.cat([after_prompt, after_answer])

    def _plain_logits(self, ids: list[int]) -> torch.Tensor:
        extra: dict[str, Any] = {"logits_to_keep": PROBED} if keeps_logits(self.model) else {}
        if getattr(self, "observed", None):
            extra["observed"] = self.observed
        with torch.inference_mode():
            output = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False, **extra)
        return output.logits[0, -PROBED:].float()

    def _compare(self, paged: torch.Tensor, plain: torch.Tensor) -> None:
        kind = type(self.model).__name__
        try:
            off, most = distance(paged, plain), allowed(self.model.dtype)
        except ValueError as error:
            raise UnsupportedError(f"{kind}: {error}") from None
        if not off <= most:
            raise UnsupportedError(
                f"{kind}: with paged attention its logits are off by {off:.2g} of their spread (allowed"
                f" {most:g}): something in it is not known here, so it cannot be served"
            )

    def run(self, step: Sequence[Work]) -> tuple[list[Work], torch.Tensor]:
        """Compute the tokens of a step and note them as computed.

        Returns:
            The works that complete their request's tokens, and the logits after each, `[len(works), V]` float32.
        """
        found = [self._run_pass(works, own) for own, works in self._passes(step)]
        if len(found) == 1:
            return found[0]
        complete = [work for works, _ in found for work in works]
        return complete, torch.cat([logits for _, logits in found])

    def _passes(self, step: Sequence[Work]) -> list[tuple[OwnPass | None, list[Work]]]:
        """Return the works that run together, those of the base and what changes it in the batch first."""
        found: dict[int, tuple[OwnPass | None, list[Work]]] = {}
        for work in step:
            own = self.adapters.own_pass(work.request.mix)
            found.setdefault(0 if own is None else id(own), (own, []))[1].append(work)
        return [found[key] for key in sorted(found, key=bool)]

    def _run_pass(self, works: Sequence[Work], own: OwnPass | None) -> tuple[list[Work], torch.Tensor]:
        ordered = _ordered(works)
        kept = [_kept(work) for work in ordered]
        with torch.inference_mode():
            if own is not None and not own.is_paged:
                pairs = zip(ordered, kept, strict=True)
                logits = torch.cat([own.logits(work.request, work.count, keep) for work, keep in pairs])
            else:
                logits = self._flat(ordered, kept, self.model if own is None else own.model)
        last_rows = _note_prompts(ordered, kept, logits)
        for work in ordered:
            work.request.num_computed += work.count
        complete = [work for work, row in zip(ordered, last_rows, strict=True) if row is not None]
        return complete, logits if len(complete) == len(logits) else logits[[r for r in last_rows if r is not None]]

    def _flat(self, ordered: Sequence[Work], kept: Sequence[list[int]], model: PreTrainedModel) -> torch.Tensor:
        """Run works as one flat batch with pages; return the logits that are kept."""
        ends = accumulate(work.count for work in ordered)
        keep = [end - work.count + at for work, end, own in zip(ordered, ends, kept, strict=True) for at in own]
        rows = self.adapters.rows([(work.request.mix, work.count) for work in ordered])
        kept_rows = [(work.request.mix, len(own)) for work, own in zip(ordered, kept, strict=True) if own]
        self._write_prefixes(ordered)
        parts = [_part(work) for work in ordered]
        is_decode = ordered[-1].count == 1 and len(keep) == len(parts)  # single tokens come first
        if self.graphs is not None and is_decode and model is self.model:
            logits = self.graphs.logits(parts, rows)
            if logits is not None:
                return logits
        with self.adapters.batch.active(rows, self.adapters.rows(kept_rows)):
            return paged_logits(model, self.memory, parts, keep, self.impl)

    def _write_prefixes(self, ordered: Sequence[Work]) -> None:
        """Store the keys and values that come before a prompt that begins."""
        for request in (work.request for work in ordered if work.request.num_virtual):
            prefix = self.adapters.prefix(request.mix)
            if request.num_computed or prefix is None:
                continue
            into = torch.tensor(slots(request.pages, self.page_size, 0, prefix.length), device=self.model.device)
            for index, layer in enumerate(self.memory.keys):
                store(self.memory.keys[layer], into, prefix.keys[index])
                store(self.memory.values[layer], into, prefix.values[index])


def _ordered(step: Sequence[Work]) -> list[Work]:
    """Put single tokens first, for they attend in one batched product; of each part, the rows of an adapter lie
    together, and what is long before what is short, so that neighbours have as much to attend to; among equals, what
    lies first in the memory."""
    own = [(-work.request.num_computed, work.request.blocks[0].pages[0]) for work in step]
    first: dict[str, tuple[int, int]] = {}
    for work, at in zip(step, own, strict=True):
        identity = work.request.mix.identity
        first[identity] = min(first.get(identity, at), at)

    def place(index: int) -> tuple[bool, tuple[int, int], str, tuple[int, int]]:
        identity = step[index].request.mix.identity
        return step[index].count > 1, first[identity], identity, own[index]

    return [step[index] for index in sorted(range(len(step)), key=place)]


def _kept(work: Work) -> list[int]:
    """Return the work's tokens after which logits are needed: the prompt's where it is scored, and the last."""
    request, last = work.request, work.count - 1
    scored = len(request.prompt) - 1 - request.num_computed if request.sampling.prompt_logprobs is not None else 0
    return [i for i in range(work.count) if i < scored or (i == last and work.completes)]


def _note_prompts(ordered: Sequence[Work], kept: Sequence[list[int]], logits: torch.Tensor) -> list[int | None]:
    """Score the prompts that ask for it; return each work's row to sample from, `None` where it is not complete."""
    last_rows: list[int | None] = []
    start = 0
    for work, own in zip(ordered, kept, strict=True):
        stop = start + len(own)
        last_rows.append(stop - 1 if work.completes else None)
        count = len(own) - work.completes
        if count:
            note_prompt(work.request, work.request.num_computed, logits[start : start + count])
        start = stop
    return last_rows


def _part(work: Work) -> Part:
    request = work.request
    if work.count == 1 and request.num_pending == 1:  # without putting prompt and answer together
        tokens = [request.output[-1] if request.output else request.prompt[-1]]
    else:
        tokens = request.tokens[request.num_computed : request.num_computed + work.count]
    return Part(tokens, request.num_virtual + request.num_computed, request.pages)
