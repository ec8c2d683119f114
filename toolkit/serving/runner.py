"""One step on the device: its work as one flat batch through the model, out come the logits to sample from."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from toolkit.errors import UnsupportedError
from toolkit.kernels.grouped_lora import Segment
from toolkit.kernels.impl import Impl
from toolkit.kernels.paging import PagedBatch
from toolkit.serving.attention import NAME, KVCache, PagedStep
from toolkit.serving.layers import BatchAdapters
from toolkit.serving.pages import PagePool
from toolkit.serving.scheduler import Work


class Runner:
    """Runs steps of one model.

    Args:
        model: loaded with the attention implementation of the toolkit.
        pool: pages of the requests.
        batch: where the model's layers look for the step's adapters.
        impl: form of the operations, `None` for the device's own.

    Raises:
        UnsupportedError: the model's attention does not go through transformers' interface.
    """

    def __init__(self, model: PreTrainedModel, pool: PagePool, batch: BatchAdapters, impl: Impl | None = None) -> None:
        self.model, self.pool, self.batch = model, pool, batch
        self.impl: Impl | None = impl
        self.cache = KVCache(pool.num_pages, pool.page_size)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._probe()

    def _probe(self) -> None:
        """Run one token, which allocates the cache of every layer and shows that attention is ours."""
        if getattr(self.model.config, "_attn_implementation", None) != NAME:
            raise UnsupportedError(f"{type(self.model).__name__} cannot take another attention, so it cannot be served")
        nowhere = torch.zeros(1, dtype=torch.long, device=self.model.device)
        batch = PagedBatch([0, 1], [1], nowhere[None], nowhere, num_decodes=1)
        with torch.inference_mode():
            self._forward([0], [0], batch, [0])
        wanted = self.model.config.get_text_config().num_hidden_layers
        if len(self.cache.keys) != wanted:
            raise UnsupportedError(
                f"{type(self.model).__name__}: {len(self.cache.keys)} of {wanted} layers attend through transformers'"
                " attention interface, so it cannot be served"
            )

    def run(self, step: Sequence[Work]) -> tuple[list[Work], torch.Tensor]:
        """Compute the tokens of a step and note them as computed.

        Returns:
            The works that complete their request's tokens, and the logits after each, `[len(works), V]` float32.
        """
        # Single tokens first, for they attend in one batched product; each part ordered by adapter, so that the
        # rows of an adapter lie together.
        ordered = sorted(step, key=lambda w: (w.count > 1, w.request.adapter or ""))
        tokens, positions = _tokens(ordered), _positions(ordered)
        ends = list(accumulate(work.count for work in ordered))
        complete = [i for i, work in enumerate(ordered) if work.completes]
        head_rows = [ends[i] - 1 for i in complete]
        rows = _segments([(work.request.adapter, work.count) for work in ordered])
        head = _segments([(ordered[i].request.adapter, 1) for i in complete])
        with torch.inference_mode(), self.batch.active(rows, head):
            logits = self._forward(tokens, positions, self._paged(ordered, ends), head_rows)
        for work in ordered:
            work.request.num_computed += work.count
        return [ordered[i] for i in complete], logits

    def _forward(self, tokens: list[int], positions: list[int], batch: PagedBatch, keep: list[int]) -> torch.Tensor:
        device = self.model.device
        rows = torch.tensor(keep, dtype=torch.long, device=device)
        extra = {"logits_to_keep": rows} if self._keeps_logits else {}
        output = self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            # transformers returns a mask of four dimensions as it is, so none is built; ours needs none.
            attention_mask=torch.empty(1, 1, 1, 1, device=device),
            use_cache=False,
            paged=PagedStep(self.cache, batch, self.impl),
            **extra,
        )
        logits = output.logits[0] if self._keeps_logits else output.logits[0, rows]
        return logits.float()

    def _paged(self, ordered: Sequence[Work], ends: Sequence[int]) -> PagedBatch:
        page = self.pool.page_size
        device = self.model.device
        lengths = [work.request.num_computed + work.count for work in ordered]
        width = -(-max(lengths) // page)
        tables, slots = [], []
        for work, length in zip(ordered, lengths, strict=True):
            table = self.pool.table(work.request)
            tables.append((table + [0] * width)[:width])
            slots += [table[t // page] * page + t % page for t in range(length - work.count, length)]
        return PagedBatch(
            starts=[0, *ends],
            lengths=lengths,
            tables=torch.tensor(tables, device=device),
            slots=torch.tensor(slots, device=device),
            num_decodes=sum(work.count == 1 for work in ordered),
        )


def _tokens(ordered: Sequence[Work]) -> list[int]:
    found: list[int] = []
    for work in ordered:
        request = work.request
        if work.count == 1 and request.num_pending == 1:
            found.append(request.output[-1] if request.output else request.prompt[-1])
        else:
            found += request.tokens[request.num_computed : request.num_computed + work.count]
    return found


def _positions(ordered: Sequence[Work]) -> list[int]:
    return [p for w in ordered for p in range(w.request.num_computed, w.request.num_computed + w.count)]


def _segments(rows: Sequence[tuple[str | None, int]]) -> list[Segment]:
    """Join neighbouring rows of the same adapter; rows without one are in no segment."""
    found: list[Segment] = []
    start = 0
    for adapter, count in rows:
        stop = start + count
        if found and found[-1].adapter == adapter and found[-1].stop == start:
            found[-1] = Segment(found[-1].start, stop, found[-1].adapter)
        elif adapter is not None:
            found.append(Segment(start, stop, adapter))
        start = stop
    return found
