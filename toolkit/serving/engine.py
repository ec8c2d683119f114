"""The engine: requests in, text out, many adapters of one base in every step."""

from __future__ import annotations

import gc
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
from transformers import PreTrainedModel

from toolkit.errors import RequestError
from toolkit.kernels.impl import Impl
from toolkit.routing.router import Choice, Router
from toolkit.serving.adapters.contents import Source
from toolkit.serving.adapters.open import open_source
from toolkit.serving.adapters.pool import AdapterInfo
from toolkit.serving.assemble import add_token_routers, assemble, longest, served_router
from toolkit.serving.attention import NAME
from toolkit.serving.finetuning.turns import Turns
from toolkit.serving.guided import Guides
from toolkit.serving.loading import load, set_attention
from toolkit.serving.logprobs import answer_logprobs
from toolkit.serving.mix import AUTO, BASE, Mix, parse_model
from toolkit.serving.prefix_groups import batch_order
from toolkit.serving.prompts import Prompt, encode_prompt
from toolkit.serving.request import Delta, FinishReason, Request, Sampling, TokenLogprob
from toolkit.serving.routing import Routing
from toolkit.serving.sampling import Sampler
from toolkit.serving.sites import remove_sites
from toolkit.serving.spec import Limits
from toolkit.serving.text import TextStream
from toolkit.serving.ticket import Answer, Ticket

LOAD_SECONDS = 0.02
"""How long a step waits for an adapter when there is nothing else to do."""

T = TypeVar("T")
log = logging.getLogger("toolkit.serving")


class Engine:
    """Serves a base, its adapters, and a router over them.

    Not safe for several threads: all calls come from the thread that steps it (`serving.loop` sees to that).

    Args:
        model: a folder, a hub id, `toolkit:base`, or a pair `(model, tokenizer)`; the latter is put back as it was
            by `close`.
        adapters: folders of adapters, full fine-tunes or compressed deltas by name.
        router: a saved router, or one in memory; it is asked for the model `auto`.
        token_routers: routers over the adapters, by the names of the models that they are: each a block such as
            `{"router": "arrow", "adapters": [...]}`, or the folder of a trained one.
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
        token_routers: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        device: str = "auto",
        dtype: str | None = None,
        impl: Impl | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        limits = limits or Limits()
        loaded = load(model, device, dtype, trust_remote_code)
        self.source, self.model, self.tokenizer = loaded.source, loaded.model, loaded.tokenizer
        self._attention_before = str(self.model.config._attn_implementation)
        self._training_before = [module for module in self.model.modules() if module.training]
        try:
            self._set_up(limits, impl, adapters or {})
            add_token_routers(self.adapters, token_routers or {})
            if router is not None:
                self.set_router(router)
        except BaseException:
            self.close()
            raise

    def _set_up(self, limits: Limits, impl: Impl | None, adapters: Mapping[str, str | Path]) -> None:
        self.model.eval()
        if self._attention_before != NAME:
            set_attention(self.model, NAME)
        self.max_model_len = longest(self.model, limits)
        self.default_max_tokens = limits.default_max_tokens
        self.runner, self.adapters, self.scheduler = assemble(self.model, limits, adapters, impl)
        self._end_tokens = _end_tokens(self.model, self.tokenizer)
        self.guides = Guides(self.tokenizer, self.num_logits, self._end_tokens)
        self.sampler = Sampler(self.guides)
        self.routing = Routing()
        self.turns = Turns(settle=partial(_settle, self.model.device))
        self._tickets: dict[Request, Ticket] = {}
        self._unrouted: list[Ticket] = []
        self._ids = itertools.count(1)
        # Going through all objects of a loaded model takes the garbage collector as long as several steps.
        gc.freeze()

    @property
    def models(self) -> list[str]:
        """Names that a request can ask for."""
        return [BASE, *self.adapters.infos, *self.adapters.token_routers, *([AUTO] if self.router else [])]

    def open_adapter(self, source: str | Path) -> Source:
        """Open an adapter and check that it fits the model; any thread may, since nothing of the engine changes.

        Raises:
            MissingError: nothing there.
            CheckpointError: broken, or made for another base.
            UnsupportedError: a kind that cannot be served.
        """
        return open_source(source, self.adapters.target, self.adapters.shared)

    def add_adapter(self, name: str, source: str | Path, opened: Source | None = None) -> AdapterInfo:
        """Register an adapter under a name; see `AdapterPool.add`."""
        return self.adapters.add(name, source, opened)

    def preload(self, model: str) -> None:
        """Put the adapters of a model on the device before a request asks for them; they may have to go again.

        Raises:
            RequestError: unknown, unreadable, or more than there is room for just now.
        """
        mix = self.adapters.mix(parse_model(model))
        self._hold_now(mix)
        self._let_go(mix)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests under way finish with it."""
        self.adapters.remove(name)

    @property
    def router(self) -> Router | None:
        """What is asked for the model `auto`."""
        return self.routing.router

    def set_router(self, router: Router | str | Path, source: str | None = None) -> None:
        """Use a router for the model `auto`.

        Args:
            router: a saved router, or one in memory.
            source: folder that one in memory was read from.

        Raises:
            SpecError: it chooses among experts that are not served.
            CheckpointError: broken files, or a router that does not fit its features.
        """
        loaded = served_router(router, self.adapters.infos, self.model, self.tokenizer, self.source)
        self.routing.use(loaded, source if isinstance(router, Router) else str(router))

    def submit(
        self,
        prompt: Prompt,
        model: str = BASE,
        sampling: Sampling | None = None,
        *,
        on_delta: Callable[[Delta], None] | None = None,
        on_choice: Callable[[Choice], None] | None = None,
        key: str = "",
        priority: int = 0,
        timeout: float | None = None,
    ) -> Ticket:
        """Queue a request.

        Args:
            prompt: a text, token ids, or chat messages.
            model: `base`, the name of an adapter or a token router, a composition such as `a:0.6+b:0.4`, or `auto`.
            sampling: how tokens are chosen.
            on_delta: called from `step` when something is added.
            on_choice: called from `step` when the router has chosen.
            key: who asks; those who were given least go first.
            priority: lower ones go before all others.
            timeout: seconds after which the request ends with an error.

        Raises:
            RequestError: unknown model, empty or over-long prompt, or more than the cache could ever hold.
        """
        if model == AUTO and self.router is None:
            raise RequestError(f"no model {model!r} (served: {', '.join(self.models)})", "model_not_found")
        mix = Mix() if model == AUTO else self.adapters.mix(parse_model(model))
        sampling = sampling or Sampling()
        ids, text = encode_prompt(self.tokenizer, prompt, self.runner.vocabulary)
        if not ids:
            raise RequestError("the prompt is empty")
        virtual = self.adapters.num_virtual(mix)
        limit = self._default_limit(virtual + len(ids)) if sampling.max_tokens is None else sampling.max_tokens
        if virtual + len(ids) + limit > self.max_model_len:
            before = f"{virtual} tokens of the adapter, " if virtual else ""
            raise RequestError(
                f"{before}{len(ids)} prompt tokens and {limit} to generate are more than the"
                f" {self.max_model_len} tokens that the model takes",
                "context_length_exceeded",
            )
        self._check_bias(sampling)
        if sampling.guide is not None:
            self.guides.compile(sampling.guide)
        request = Request(
            f"r{next(self._ids)}",
            ids,
            mix,
            replace(sampling, max_tokens=limit),
            on_delta,
            key=key,
            priority=priority,
            deadline=None if timeout is None else time.monotonic() + timeout,
            num_virtual=virtual,
            is_apart=self.adapters.is_apart(mix),
        )
        self.scheduler.check_fits(request)
        ticket = Ticket(request, model, text, TextStream(self.tokenizer, sampling.stop, ids), on_choice=on_choice)
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
        self.scheduler.add(ticket.request)
        self.adapters.acquire(ticket.request.mix)
        self.adapters.prepare(ticket.request.mix)  # so that its adapters come while it waits

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
        """Whether a request is queued or running, or a run of fine-tuning is under way."""
        return self._has_requests or self.turns.is_open

    @property
    def _has_requests(self) -> bool:
        return bool(self._unrouted) or self.scheduler.has_work

    def step(self) -> bool:
        """Route what waits for it, compute one batch and add one token to every answer that is due; what that leaves of
        the step goes to fine-tuning."""
        started = time.perf_counter()
        tokens = self._serve()
        if not tokens and self._has_requests:
            self.adapters.loader.wait(LOAD_SECONDS)
        left = self.scheduler.max_batch_tokens - tokens
        self.turns.give(left, time.perf_counter() - started, idle=not self._has_requests)
        return self.has_work

    def _serve(self) -> int:
        """Compute what requests need; return its tokens."""
        self._expire()
        self._route()
        work = self.scheduler.schedule()
        self._fail_unreadable()
        if not work:
            return 0
        complete, logits = self.runner.run(work)
        self.scheduler.computed(work)
        requests = [w.request for w in complete]
        tokens = self.sampler.sample(requests, logits)
        scores = answer_logprobs(requests, logits, tokens)
        for request, token, score in zip(requests, tokens, scores, strict=True):
            ticket = self._tickets.get(request)
            if ticket is None:
                continue  # a receiver of this step's text has cancelled it
            if token is None:
                fault = self.sampler.fault(request)
                broken = f"the logits of {ticket.model!r} are no numbers, so no token can be chosen"
                self._end(ticket, "error", fault or broken)
            elif request.sampling.max_tokens == 0:
                self._end(ticket, "length")  # its prompt was all that was asked for
            else:
                self._advance(ticket, token, score)
        return sum(w.count for w in work)

    def _expire(self) -> None:
        """End the requests whose time is over."""
        now = time.monotonic()
        over = [t for t in self._tickets.values() if t.request.deadline is not None and t.request.deadline <= now]
        for ticket in over:
            if ticket in self._unrouted:
                self._unrouted.remove(ticket)
            self._end(ticket, "error", "the time that the request allowed is over", timed_out=True)

    def _fail_unreadable(self) -> None:
        """End the requests whose adapters could not be read."""
        while self.adapters.loader.failures:
            key, reason = self.adapters.loader.failures.popitem()
            for ticket in [t for t in self._tickets.values() if key in t.request.mix.keys]:
                self._end(ticket, "error", reason)

    def _route(self) -> None:
        if not self._unrouted or self.router is None:
            return
        tickets, self._unrouted = self._unrouted, []
        try:
            choices = self.routing.choose([t.user_text for t in tickets])
        except Exception:
            # What already runs goes on: it needs no router.
            log.exception("the router failed; the requests that wait for it end with an error")
            for ticket in tickets:
                self._end(ticket, "error", "the router failed; see the server's log")
            return
        for ticket, choice in zip(tickets, choices, strict=True):
            ticket.choice, ticket.model = choice, choice.expert
            self._tell(ticket, ticket.on_choice, choice)
            if ticket.request.finished is not None:
                continue
            self._queue_chosen(ticket)

    def _queue_chosen(self, ticket: Ticket) -> None:
        request = ticket.request
        try:
            request.mix = self.adapters.mix(parse_model(ticket.model))
            request.num_virtual = self.adapters.num_virtual(request.mix)
            request.is_apart = self.adapters.is_apart(request.mix)
            self._queue(ticket)
        except RequestError as error:
            request.mix = Mix()
            self._end(ticket, "error", f"the router chose {ticket.model}, which cannot answer: {error}")

    def _advance(self, ticket: Ticket, token: int, score: TokenLogprob | None) -> None:
        request, sampling = ticket.request, ticket.request.sampling
        if token in sampling.stop_token_ids or (token in self._end_tokens and not sampling.ignore_eos):
            self._end(ticket, "stop")
            return
        request.output.append(token)
        if score is not None:
            score = replace(score, offset=ticket.stream.num_read)
            request.logprobs.append(score)
        # What nobody reads as it comes is decoded once, at the end.
        is_read = request.on_delta is not None or ticket.stream.stops or score is not None
        new = ticket.stream.push(request.output) if is_read else ""
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

    def _end(
        self,
        ticket: Ticket,
        reason: FinishReason,
        error: str = "",
        new: str = "",
        score: TokenLogprob | None = None,
        timed_out: bool = False,
    ) -> None:
        request = ticket.request
        if not ticket.stream.stopped:
            read = ticket.stream.finish if reason in ("stop", "length") else ticket.stream.push
            new += read(request.output)
        request.text, request.finished, request.error = ticket.stream.text, reason, error
        if self.scheduler.finish(request):
            self.adapters.abandon(request.mix)
        self.sampler.forget(request)
        self._tickets.pop(request, None)
        self._tell(ticket, request.on_delta, Delta(new, len(request.output), reason, error, score, timed_out))

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
        tickets: dict[int, Ticket] = {}
        try:
            for index in self._batch_order(prompts, names, sampling or Sampling()):
                tickets[index] = self.submit(prompts[index], names[index], sampling)
            while any(ticket.request.finished is None for ticket in tickets.values()):
                self.step()
        finally:
            for ticket in tickets.values():
                self.cancel(ticket)  # leaves the finished alone
        return [tickets[index].answer() for index in range(len(prompts))]

    def _batch_order(self, prompts: Sequence[Prompt], names: Sequence[str], sampling: Sampling) -> list[int]:
        """Return the order in which prompts are submitted: that in which most is shared."""
        if len(prompts) != len(names):
            raise ValueError(f"{len(prompts)} prompts for {len(names)} models")
        ids = [encode_prompt(self.tokenizer, prompt, self.runner.vocabulary)[0] for prompt in prompts]
        limit = sampling.max_tokens or self.default_max_tokens
        return batch_order(ids, [limit] * len(ids), names, self.scheduler.pool.page_size)

    @contextmanager
    def using(self, name: str) -> Iterator[PreTrainedModel]:
        """Yield the model with one adapter on every row of ordinary forward passes inside the block.

        Raises:
            RequestError: no such adapter.
        """
        mix = self.adapters.mix(parse_model(name))
        if self.adapters.num_virtual(mix):
            raise RequestError(f"{name!r} comes before the prompt, so it has no forward pass of its own")
        self._hold_now(mix)
        try:
            own = self.adapters.own_pass(mix)
            with self.adapters.batch.on_every_row(self.adapters.rows([(mix, 1)])):
                yield self.model if own is None else own.model
        finally:
            self._let_go(mix)

    def _let_go(self, mix: Mix) -> None:
        self.adapters.release(mix)
        self.adapters.abandon(mix)

    def _hold_now(self, mix: Mix) -> None:
        """Put adapters on the device, waiting until they have been read."""
        self.adapters.acquire(mix)
        try:
            while not self.adapters.prepare(mix):
                failed = [key for key in mix.keys if key in self.adapters.loader.failures]
                if failed:
                    raise RequestError(self.adapters.loader.failures.pop(failed[0]))
                self.adapters.loader.wait(LOAD_SECONDS)
            if self.adapters.pages_to_hold(mix) > self.scheduler.pool.num_free:
                raise RequestError("the cache has no room for the adapter just now")
            self.adapters.hold(mix)
        except BaseException:
            self.adapters.abandon(mix)
            raise

    def check(self) -> None:
        """Verify the engine's books."""
        self.scheduler.check()
        self.adapters.check()

    def close(self) -> None:
        """Give a model that came as an object back as it was."""
        gc.unfreeze()
        if hasattr(self, "adapters"):
            self.adapters.close()
        remove_sites(self.model)
        if self._attention_before != NAME:
            set_attention(self.model, self._attention_before)
        for module in self._training_before:
            module.training = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Return the ids that end an answer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(ends) if isinstance(ends, list) else {ends}
    return {end for end in found | {tokenizer.eos_token_id} if isinstance(end, int)}


def _settle(device: torch.device) -> None:
    """Wait until a device has done what it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
