"""The engine: requests in, text out, many adapters of one base in every step."""

from __future__ import annotations

import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
from transformers import PreTrainedModel

from toolkit.checkpoints.dtypes import by_torch_name
from toolkit.checkpoints.locate import locate
from toolkit.errors import MissingError, Problem, RequestError, SpecError, UnsupportedError
from toolkit.kernels.grouped_lora import Segment
from toolkit.kernels.impl import Impl
from toolkit.models.load import LoadedModel, load_model, pick_device, quiet_transformers
from toolkit.routing.embedding import HiddenStates
from toolkit.routing.router import Choice, Router, load_router
from toolkit.serving.adapter_pool import AdapterInfo, AdapterPool
from toolkit.serving.attention import NAME
from toolkit.serving.layers import BatchAdapters, unwrap_all
from toolkit.serving.logprobs import answer_logprobs
from toolkit.serving.pages import PagePool
from toolkit.serving.prompts import Prompt, encode_prompt
from toolkit.serving.request import Delta, FinishReason, Request, Sampling, TokenLogprob
from toolkit.serving.runner import Runner
from toolkit.serving.sampling import Sampler
from toolkit.serving.scheduler import Scheduler
from toolkit.serving.spec import Limits
from toolkit.serving.text import TextStream

BASE, AUTO = "base", "auto"

T = TypeVar("T")
log = logging.getLogger("toolkit.serving")


@dataclass(frozen=True)
class Answer:
    """A finished request.

    Attributes:
        text: the answer.
        tokens: its ids.
        model: what gave it: `base` or an adapter.
        finish_reason: why it ended.
        prompt_tokens: length of the prompt.
        choice: what the router chose, where it was asked.
        logprobs: of the answer's tokens, where the sampling asks for them.
        prompt_logprobs: of the prompt's tokens but the first, likewise.
    """

    text: str
    tokens: list[int]
    model: str
    finish_reason: FinishReason
    prompt_tokens: int
    choice: Choice | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class Ticket:
    """A request as its submitter sees it.

    Attributes:
        request: the engine's own.
        model: `base` or an adapter; `auto` until the router has chosen.
        user_text: what the router looks at.
        choice: what it chose.
    """

    request: Request
    model: str
    user_text: str
    stream: TextStream
    choice: Choice | None = None
    on_choice: Callable[[Choice], None] | None = field(default=None, repr=False)

    def answer(self) -> Answer:
        """Return the finished answer.

        Raises:
            RequestError: there is none, for the request ended with an error.
        """
        request = self.request
        assert request.finished is not None
        if request.finished == "error":
            raise RequestError(request.error)
        return Answer(
            request.text,
            request.output,
            self.model,
            request.finished,
            len(request.prompt),
            self.choice,
            request.logprobs,
            request.prompt_logprobs,
        )


class Engine:
    """Serves a base, its adapters, and a router over them.

    Not safe for several threads: all calls come from the thread that steps it (`serving.loop` sees to that).

    Args:
        model: a folder, a hub id, `toolkit:base`, or a pair `(model, tokenizer)`; the latter is put back as it was
            by `close`.
        adapters: PEFT LoRA folders by name.
        router: a saved router, or one in memory; it is asked for the model `auto`.
        limits: sizes of the batch and of the cache.
        device: `auto`, `cpu`, `cuda`, ...; a model that comes as an object stays where it is.
        dtype: of the weights, such as `bfloat16`; by default as stored, but float32 on a CPU; of an object its own.
        impl: form of the operations, `None` for the device's own.
        trust_remote_code: run code that comes with the model.

    Raises:
        UnsupportedError: the model, or an adapter, cannot be served.
        SpecError: the limits are more than the model takes, or the router chooses among what is not served.
    """

    def __init__(
        self,
        model: Any,
        adapters: Mapping[str, str | Path] | None = None,
        router: Router | str | Path | None = None,
        *,
        limits: Limits | None = None,
        device: str = "auto",
        dtype: str | None = None,
        impl: Impl | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        limits = limits or Limits()
        loaded = _load(model, device, dtype, trust_remote_code)
        self.source, self.model, self.tokenizer = loaded.source, loaded.model, loaded.tokenizer
        self._attention_before = str(self.model.config._attn_implementation)
        self._training_before = [module for module in self.model.modules() if module.training]
        try:
            self._set_up(limits, impl)
            for name, source in (adapters or {}).items():
                self.add_adapter(name, source)
            if router is not None:
                self.set_router(router)
        except BaseException:
            self.close()
            raise

    def _set_up(self, limits: Limits, impl: Impl | None) -> None:
        self.model.eval()
        if self._attention_before != NAME:
            _set_attention(self.model, NAME)
        self.max_model_len = self._longest(limits)
        self.default_max_tokens = limits.default_max_tokens
        pool = PagePool(limits.num_pages(self.max_model_len), limits.page_size)
        batch = BatchAdapters(impl=impl)
        self.runner = Runner(self.model, pool, batch, impl)
        self.scheduler = Scheduler(pool, limits.max_batch_tokens, limits.max_requests)
        self.adapters = AdapterPool(self.model, batch)
        self.sampler = Sampler()
        self.router: Router | None = None
        self.decisions: Counter[str] = Counter()
        self._tickets: dict[Request, Ticket] = {}
        self._unrouted: list[Ticket] = []
        self._ids = itertools.count(1)

    def _longest(self, limits: Limits) -> int:
        known = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        wanted = limits.max_model_len
        if known and wanted and wanted > known:
            raise SpecError([Problem("limits.max_model_len", f"the model takes at most {known} tokens, got {wanted}")])
        return wanted or known or 4096

    @property
    def models(self) -> list[str]:
        """Names that a request can ask for."""
        return [BASE, *self.adapters.infos, *([AUTO] if self.router else [])]

    def add_adapter(self, name: str, source: str | Path) -> AdapterInfo:
        """Load an adapter under a name; see `AdapterPool.add`."""
        return self.adapters.add(name, source)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests under way finish with it."""
        self.adapters.remove(name)

    def set_router(self, router: Router | str | Path) -> None:
        """Use a router for the model `auto`.

        Raises:
            SpecError: it chooses among experts that are not served.
        """
        loaded = router if isinstance(router, Router) else load_router(router)
        absent = [name for name in loaded.experts if name != BASE and name not in self.adapters.infos]
        if absent:
            served = ", ".join([BASE, *self.adapters.infos])
            message = f"the router chooses among {', '.join(absent)}, which are not served (served: {served})"
            raise SpecError([Problem("router", message)])
        if self._embeds_with_this_base(loaded):
            loaded.embedder = HiddenStates(
                self.model, self.tokenizer, loaded.embedding.layer, loaded.embedding.max_length
            )
        self.router = loaded

    def _embeds_with_this_base(self, router: Router) -> bool:
        try:
            return isinstance(router.embedding.model, str) and locate(router.embedding.model) == locate(self.source)
        except MissingError:
            return False

    def submit(
        self,
        prompt: Prompt,
        model: str = BASE,
        sampling: Sampling | None = None,
        *,
        on_delta: Callable[[Delta], None] | None = None,
        on_choice: Callable[[Choice], None] | None = None,
    ) -> Ticket:
        """Queue a request.

        Args:
            prompt: a text, token ids, or chat messages.
            model: `base`, an adapter's name, or `auto`.
            sampling: how tokens are chosen.
            on_delta: called from `step` when something is added.
            on_choice: called from `step` when the router has chosen.

        Raises:
            RequestError: unknown model, empty or over-long prompt, or more than the cache could ever hold.
        """
        if model not in self.models:
            raise RequestError(f"no model {model!r} (served: {', '.join(self.models)})", "model_not_found")
        sampling = sampling or Sampling()
        ids, text = encode_prompt(self.tokenizer, prompt, self.runner.vocabulary)
        if not ids:
            raise RequestError("the prompt is empty")
        limit = self._default_limit(len(ids)) if sampling.max_tokens is None else sampling.max_tokens
        if len(ids) + limit > self.max_model_len:
            raise RequestError(
                f"{len(ids)} prompt tokens and {limit} to generate are more than the"
                f" {self.max_model_len} tokens that the model takes",
                "context_length_exceeded",
            )
        self._check_bias(sampling)
        sampling = replace(sampling, max_tokens=limit)
        request = Request(f"r{next(self._ids)}", ids, None, sampling, on_delta)
        self.scheduler.check_fits(request)
        stream = TextStream(self.tokenizer, sampling.stop, ids)
        ticket = Ticket(request, model, text, stream, on_choice=on_choice)
        if model == AUTO:
            self._unrouted.append(ticket)
        else:
            self._queue(ticket)
        self._tickets[request] = ticket
        return ticket

    def _check_bias(self, sampling: Sampling) -> None:
        wrong = next((token for token in sampling.logit_bias if token >= self.num_logits), None)
        if wrong is not None:
            raise RequestError(f"logit_bias names token id {wrong}, but the model's ids are 0 to {self.num_logits - 1}")

    def _default_limit(self, prompt_tokens: int) -> int:
        """Return the tokens of an answer whose request names no limit; see `Limits`."""
        room = min(self.max_model_len, self.scheduler.pool.capacity) - prompt_tokens
        return max(1, min(self.default_max_tokens, room))

    def _queue(self, ticket: Ticket) -> None:
        if ticket.model != BASE:
            ticket.request.adapter = self.adapters.acquire(ticket.model)
        self.scheduler.add(ticket.request)

    def cancel(self, ticket: Ticket) -> None:
        """End a request and free its pages at once."""
        if ticket in self._unrouted:
            self._unrouted.remove(ticket)
        if ticket.request.finished is None:
            self._end(ticket, "cancelled")

    def fail_all(self, error: str) -> None:
        """End every request with an error."""
        self._unrouted.clear()
        for ticket in list(self._tickets.values()):
            self._end(ticket, "error", error)

    @property
    def num_logits(self) -> int:
        """Tokens that the model can generate: rows of its output head."""
        head = self.model.get_output_embeddings()
        return cast(torch.Tensor, head.weight).shape[0] if head is not None else self.runner.vocabulary

    @property
    def num_running(self) -> int:
        """Requests that have pages."""
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for the router or for pages."""
        return len(self._unrouted) + len(self.scheduler.waiting)

    @property
    def has_work(self) -> bool:
        """Whether a request is queued or running."""
        return bool(self._unrouted) or self.scheduler.has_work

    def step(self) -> bool:
        """Route what waits for it, compute one batch and add one token to every answer that is due."""
        self._route()
        work = self.scheduler.schedule()
        if not work:
            return self.has_work
        complete, logits = self.runner.run(work)
        requests = [w.request for w in complete]
        tokens = self.sampler.sample(requests, logits)
        scores = answer_logprobs(requests, logits, tokens)
        for request, token, score in zip(requests, tokens, scores, strict=True):
            ticket = self._tickets.get(request)
            if ticket is None:
                continue  # a receiver of this step's text has cancelled it
            if token is None:
                self._end(ticket, "error", f"the logits of {ticket.model!r} are no numbers, so no token can be chosen")
            elif request.sampling.max_tokens == 0:
                self._end(ticket, "length")  # its prompt was all that was asked for
            else:
                self._advance(ticket, token, score)
        return self.has_work

    def _route(self) -> None:
        if not self._unrouted or self.router is None:
            return
        tickets, self._unrouted = self._unrouted, []
        try:
            choices = self.router.choose([t.user_text for t in tickets])
        except Exception:
            # What already runs goes on: it needs no router.
            log.exception("the router failed; the requests that wait for it end with an error")
            for ticket in tickets:
                self._end(ticket, "error", "the router failed; see the server's log")
            return
        for ticket, choice in zip(tickets, choices, strict=True):
            ticket.choice, ticket.model = choice, choice.expert
            self.decisions[choice.expert] += 1
            self._tell(ticket, ticket.on_choice, choice)
            if ticket.request.finished is not None:
                continue
            if choice.expert != BASE and choice.expert not in self.adapters.infos:
                self._end(ticket, "error", f"the router chose {choice.expert}, which was removed")
            else:
                self._queue(ticket)

    def _advance(self, ticket: Ticket, token: int, score: TokenLogprob | None) -> None:
        request, sampling = ticket.request, ticket.request.sampling
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self._end_tokens)
        if token in ends:
            self._end(ticket, "stop")
            return
        request.output.append(token)
        if score is not None:
            score = replace(score, offset=ticket.stream.num_read)
            request.logprobs.append(score)
        new = ticket.stream.push(request.output)
        if ticket.stream.stopped:
            self._end(ticket, "stop", new=new, score=score)
        elif request.num_tokens >= request.max_tokens:
            self._end(ticket, "length", new=new, score=score)
        else:
            self._tell(ticket, request.on_delta, Delta(new, len(request.output), logprob=score))

    def _tell(self, ticket: Ticket, receiver: Callable[[T], None] | None, item: T) -> None:
        """Call a receiver; one that fails loses its request, and nobody else theirs."""
        if receiver is None:
            return
        try:
            receiver(item)
        except Exception:
            log.exception("the receiver of request %s failed; the request is cancelled", ticket.request.id)
            ticket.request.on_delta = None
            self.cancel(ticket)

    @property
    def _end_tokens(self) -> set[int]:
        config = getattr(self.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        found = set(ends) if isinstance(ends, list) else {ends}
        return {end for end in found | {self.tokenizer.eos_token_id} if isinstance(end, int)}

    def _end(
        self,
        ticket: Ticket,
        reason: FinishReason,
        error: str = "",
        new: str = "",
        score: TokenLogprob | None = None,
    ) -> None:
        request = ticket.request
        if reason in ("stop", "length") and not ticket.stream.stopped:
            new += ticket.stream.finish(request.output)
        request.text, request.finished, request.error = ticket.stream.text, reason, error
        self.scheduler.finish(request)
        self._release(request)
        self.sampler.forget(request)
        self._tickets.pop(request, None)
        self._tell(ticket, request.on_delta, Delta(new, len(request.output), reason, error, score))

    def _release(self, request: Request) -> None:
        if request.adapter is not None:
            self.adapters.release(request.adapter)
            request.adapter = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        models: str | Sequence[str] = BASE,
        sampling: Sampling | None = None,
    ) -> list[Answer]:
        """Answer prompts, all in one batch as far as it holds them.

        Args:
            prompts: texts, token ids or chat messages.
            models: one name for all, or one per prompt.
            sampling: how tokens are chosen.

        Returns:
            One answer per prompt, in order.

        Raises:
            RequestError: a prompt cannot be answered; the others are given up.
        """
        names = [models] * len(prompts) if isinstance(models, str) else list(models)
        tickets: list[Ticket] = []
        try:
            for prompt, name in zip(prompts, names, strict=True):
                tickets.append(self.submit(prompt, name, sampling))
            while any(ticket.request.finished is None for ticket in tickets):
                self.step()
        finally:
            for ticket in tickets:
                self.cancel(ticket)  # leaves the finished alone
        return [ticket.answer() for ticket in tickets]

    @contextmanager
    def using(self, name: str) -> Iterator[PreTrainedModel]:
        """Yield the model with one adapter on every row of ordinary forward passes inside the block.

        Raises:
            RequestError: no such adapter.
        """
        if name not in (BASE, *self.adapters.infos):
            raise RequestError(f"no model {name!r}", "model_not_found")
        every_row = [] if name == BASE else [Segment(0, sys.maxsize, self.adapters.infos[name].key)]
        with self.adapters.batch.active(every_row, every_row):
            yield self.model

    def check(self) -> None:
        """Verify the engine's books."""
        self.scheduler.check()

    def close(self) -> None:
        """Give a model that came as an object back as it was."""
        unwrap_all(self.model)
        if self._attention_before != NAME:
            _set_attention(self.model, self._attention_before)
        for module in self._training_before:
            module.training = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _load(model: Any, device: str, dtype: str | None, trust_remote_code: bool) -> LoadedModel:
    """Load what is served; of a model that came as an object, check that it is as it is asked for."""
    form = by_torch_name(dtype) if dtype else None
    if form and not form.floating:
        raise UnsupportedError(f"dtype {dtype!r} is not one that a model can run in; use bfloat16, float16 or float32")
    wanted = getattr(torch, form.torch) if form else None
    place = pick_device(device)
    if isinstance(model, tuple | LoadedModel):
        loaded = load_model(model)
        own = loaded.model.device
        if device != "auto" and (place.type != own.type or place.index not in (None, own.index)):
            raise UnsupportedError(f"the model is on {own}, not on {device}; move it first, or leave device out")
        if wanted not in (None, loaded.model.dtype):
            raise UnsupportedError(
                f"the model is in {loaded.model.dtype}, not in {wanted}; convert it first, or leave dtype out"
            )
        return loaded
    return load_model(model, device=place, dtype=wanted, attention=NAME, trust_remote_code=trust_remote_code)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Change a model's attention; whether it could, the runner sees."""
    with quiet_transformers():
        try:
            model.set_attn_implementation(name)
        except ValueError as error:
            raise UnsupportedError(f"{type(model).__name__} cannot take another attention ({error})") from None
