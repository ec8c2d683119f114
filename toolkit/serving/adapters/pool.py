"""The adapters of an engine: which name means which content, and what of it is on the device.

An adapter is identified by a hash of its content, so a name that is loaded anew is a new adapter: requests that
are under way finish with the one they began with, and nothing cached under the old one can be taken for the new.

Contents are on disk, on the host, and, while requests use them, in the pages of the device's pool (`pages`). Those that
nobody uses stay there until the room is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from toolkit.errors import RequestError, ToolkitError, UnsupportedError
from toolkit.kernels.grouped_lora import PagedPairs, Pair, Segment
from toolkit.kernels.grouped_lora.routes import Routes
from toolkit.serving.adapters.contents import Contents, Prefix, Source
from toolkit.serving.adapters.open import open_source
from toolkit.serving.adapters.target import Target
from toolkit.serving.adapters.tiers import MOST_AHEAD, HostTier, Loader
from toolkit.serving.adapters.tuned import SharedTensors
from toolkit.serving.memory import Memory
from toolkit.serving.mix import AUTO, BASE, Mix, Named
from toolkit.serving.own_pass import OwnPass
from toolkit.serving.pages import Block, PagePool
from toolkit.serving.sites import PLAIN, BatchAdapters, LinearGroup, Rows, Site, place_site
from toolkit.serving.token_routing import RoutedRows, TokenRouters

RESERVED = (BASE, AUTO)
_FORBIDDEN = "+:/\\"

MOST_SLOTS = 4096
"""Adapters that can be on the device at once."""


@dataclass(frozen=True)
class AdapterInfo:
    """A registered adapter.

    Attributes:
        name: that requests use.
        key: hash of its content.
        source: folder it came from.
        description: kind, rank, modules.
        base: model that the adapter says it was trained on.
        nbytes: of its contents.
        pages: that it takes on the device.
    """

    name: str
    key: str
    source: str
    description: str
    base: str | None
    nbytes: int
    pages: int


@dataclass
class _Entry:
    """What is known of one content.

    Attributes:
        sources: folders that hold it, by the name that they were registered under.
        pages: that it takes.
        users: requests that are answered with it, waiting or running.
        block: its pages while it is on the device.
        slot: its place in the tables of the kernels, likewise.
        prefix: on the device, likewise.
        own_pass: likewise.
    """

    sources: dict[str, Source]
    pages: int
    users: int = 0
    block: Block | None = None
    slot: int = -1
    prefix: Prefix | None = None
    own_pass: OwnPass | None = None
    groups: list[LinearGroup] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)

    @property
    def source(self) -> Source:
        """What is the same of every folder that holds it."""
        return next(iter(self.sources.values()))

    def read(self) -> Contents:
        """Read the contents, from whichever folder still has them.

        Raises:
            ToolkitError: none has.
        """
        *others, last = list(self.sources.values())
        for source in others:
            try:
                return source.read()
            except (OSError, ToolkitError):  # the former where a folder goes while it is read
                continue
        return last.read()


class AdapterPool:
    """Adapters by name and by content; what the scheduler asks where they are (`scheduler.Residents`).

    Args:
        target: whose modules are adapted; they are wrapped as adapters ask for them.
        memory: of the device.
        pages: of the same memory.
        batch: the running step's rows, which the wrapped modules read.
        host_bytes: contents that are kept on the host.
        shared: tensors of fine-tunes.

    Attributes:
        infos: by name.
        token_routers: over them.
        loader: reads contents.
        num_hits: times that a request found its adapter on the device.
        num_placed: times that contents were copied there.
        num_evicted: times that they had to go.
    """

    def __init__(
        self,
        target: Target,
        memory: Memory,
        pages: PagePool,
        batch: BatchAdapters,
        host_bytes: int,
        shared: SharedTensors,
    ) -> None:
        self.target, self.memory, self.pool, self.batch = target, memory, pages, batch
        self.infos: dict[str, AdapterInfo] = {}
        self.token_routers = TokenRouters(self.source_of, target.model.device)
        self.loader, self.host, self.shared = Loader(), HostTier(host_bytes), shared
        self.num_hits = self.num_placed = self.num_evicted = 0
        self._entries: dict[str, _Entry] = {}
        self._groups: dict[str, LinearGroup] = {}
        self._slots = list(reversed(range(min(pages.num_pages, MOST_SLOTS))))
        self._num_slots = len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages of adapters that are on the device."""
        pages = sum(entry.pages for entry in self._entries.values() if entry.block)
        return pages * self.memory.page_bytes

    def linear_groups(self) -> list[LinearGroup]:
        """Return the linears that low-rank adapters work at, those that were adapted last at the end."""
        return list(self._groups.values())

    @property
    def num_resident(self) -> int:
        """Adapters that are on the device."""
        return sum(entry.block is not None for entry in self._entries.values())

    def add(self, name: str, source: str | Path, opened: Source | None = None) -> AdapterInfo:
        """Register an adapter under a name; a name that is taken now means the new one.

        Its contents are read when a request asks for them.

        Args:
            name: for requests.
            source: a folder or hub id.
            opened: the same, if it has been opened.

        Raises:
            RequestError: the name cannot be used.
            MissingError: no such adapter.
            CheckpointError: broken, or made for another base.
            UnsupportedError: a kind that cannot be served, or more than the device holds.
        """
        check_name(name)
        if name in self.token_routers:
            raise RequestError(f"adapter name {name!r}: a token router is served under it")
        found = opened or open_source(source, self.target, self.shared)
        if found.key not in self._entries:
            self._entries[found.key] = _Entry({}, self._count_pages(found, str(source)))
        entry, old = self._entries[found.key], self.infos.get(name)
        entry.sources[name] = found
        about = found.description, found.base, found.nbytes, entry.pages
        info = AdapterInfo(name, found.key, str(source), *about)
        self.infos = {**self.infos, name: info}  # other threads may be going through the old one
        if old and old.key != info.key:
            self._disown(name, old.key)
        return info

    def remove(self, name: str) -> None:
        """Forget a name; the contents go when no request uses them.

        Raises:
            RequestError: no such adapter, or one that a token router mixes.
        """
        if name not in self.infos:
            raise RequestError(f"no adapter {name!r}", "model_not_found")
        if users := self.token_routers.users_of(name):
            raise RequestError(f"token router {users[0]!r} mixes {name!r}, so it stays")
        key = self.infos[name].key
        self.infos = {other: info for other, info in self.infos.items() if other != name}
        self._disown(name, key)

    def source_of(self, name: str) -> Source:
        """Return the content that a name means now.

        Raises:
            RequestError: no such adapter.
        """
        if name not in self.infos:
            served = ", ".join([BASE, *self.infos])
            raise RequestError(f"no model {name!r} (served: {served})", "model_not_found")
        return self._entries[self.infos[name].key].source

    def mix(self, named: Named) -> Mix:
        """Return what a composition of names means now.

        Raises:
            RequestError: an unknown name, or an adapter that cannot be weighted or combined.
        """
        routed = [name for name, _ in named if name in self.token_routers]
        if routed and len(named) == 1 and named[0][1] == 1:
            return self.token_routers.mix(routed[0])
        if routed:
            raise RequestError(f"token router {routed[0]!r} can neither be weighted nor combined with others")
        for name, _ in named:
            self.source_of(name)  # is there
        mix = Mix.of([(self.infos[name].key, weight) for name, weight in named])
        for name, _ in named:
            if mix.parts and self._entries[self.infos[name].key].source.is_exclusive and not _is_alone(mix):
                raise RequestError(
                    f"{name!r} ({self.infos[name].description}) can neither be weighted nor combined with others"
                )
        return mix

    def acquire(self, mix: Mix) -> None:
        """Keep the contents known until a request that is answered with them is done."""
        for key in mix.keys:
            self._entries[key].users += 1
        self.token_routers.acquire(mix)

    def abandon(self, mix: Mix) -> None:
        """Note that a request is done."""
        for key in mix.keys:
            self._entries[key].users -= 1
            if not self._entries[key].users:
                self.loader.forget(key)
            self._drop_unused(key)
        self.token_routers.abandon(mix)

    def num_virtual(self, mix: Mix) -> int:
        """Return the tokens that come before the prompt."""
        return sum(self._entries[key].source.num_virtual for key in mix.keys)

    def prepare(self, mix: Mix) -> bool:
        """See `Residents`: read what is neither on the device nor on the host, in the background."""
        missing = self._missing(mix)
        if not missing:
            return True
        found = self.loader.collect(missing)
        for key, contents in found.items():
            self.host.put(key, contents, needed=mix.keys)
        if len(found) == len(missing):
            return True
        if not any(key in self.loader.failures for key in missing):
            self.loader.ask(missing, self._reader(missing))
        return False

    def expect(self, mix: Mix) -> bool:
        """See `Residents`."""
        missing = self._missing(mix)
        return not missing or self.loader.ask(missing, self._reader(missing), MOST_AHEAD)

    def _missing(self, mix: Mix) -> list[str]:
        return [key for key in mix.keys if self._entries[key].block is None and key not in self.host]

    def _reader(self, keys: Sequence[str]) -> Callable[[str], Contents]:
        entries = {key: self._entries[key] for key in keys}
        return lambda key: entries[key].read()

    def pages(self, mix: Mix) -> int:
        """See `Residents`."""
        return sum(self._entries[key].pages for key in mix.keys)

    def pages_to_hold(self, mix: Mix) -> int:
        """See `Residents`."""
        entries = [self._entries[key] for key in mix.keys]
        return sum(entry.pages for entry in entries if entry.block is None or not entry.block.holders)

    def hold(self, mix: Mix) -> None:
        """See `Residents`."""
        entries = [self._entries[key] for key in mix.keys]
        missing = [entry for entry in entries if entry.block is None]
        for entry in entries:
            if entry.block is not None:  # before others are placed, which could push it out
                self.num_hits += 1
                self.pool.hold(entry.block)
        for entry in missing:
            self._place(entry, self.host.get(entry.source.key))

    def release(self, mix: Mix) -> None:
        """See `Residents`."""
        for key in mix.keys:
            block = self._entries[key].block
            assert block is not None, "only what is held is released"
            self.pool.release(block)

    def rows(self, runs: Sequence[tuple[Mix, int]]) -> Rows:
        """Return which adapters work on which rows.

        Args:
            runs: mixes on the device and the number of consecutive rows of each.
        """
        if not any(mix.parts for mix, _ in runs):
            return PLAIN
        width = max(0 if mix.router else len(mix.parts) for mix, _ in runs)
        routed: list[RoutedRows] = []
        slots: list[list[int]] = []
        weights: list[list[float]] = []
        segments: list[Segment] = []
        for mix, count in runs:
            if mix.router:
                self._route(mix, len(slots), count, routed)
                slots += [[-1] * width] * count
                weights += [[0.0] * width] * count
                continue
            entries = [(self._entries[key], weight) for key, weight in mix.parts]
            low = [(entry.slot, weight) for entry, weight in entries if entry.groups]
            segments += [
                Segment(len(slots), len(slots) + count, entry.source.key, weight)
                for entry, weight in entries
                if entry.sites
            ]
            empty = width - len(low)
            slots += [[slot for slot, _ in low] + [-1] * empty] * count
            weights += [[weight for _, weight in low] + [0.0] * empty] * count
        used = frozenset(slot for row in slots for slot in row if slot >= 0)
        mixed = {slot for rows in routed for slot in rows.slots}
        return Rows(Routes.of(slots, weights) if used else None, used | mixed, segments, routed)

    def _route(self, mix: Mix, start: int, count: int, routed: list[RoutedRows]) -> None:
        """Add rows of a token router, to those before them where it is the same."""
        router = self.token_routers.of(mix)
        if routed and routed[-1].stop == start and routed[-1].router is router:
            routed[-1].stop += count
        else:
            slots = tuple(self._entries[key].slot for key in router.keys)
            routed.append(RoutedRows(start, start + count, router, slots))

    def prefix(self, mix: Mix) -> Prefix | None:
        """Return the keys and values before the prompt of a mix on the device."""
        return next((self._entries[key].prefix for key in mix.keys if self._entries[key].prefix), None)

    def is_apart(self, mix: Mix) -> bool:
        """Tell whether requests run one by one, with caches of their own."""
        return any(self._entries[key].source.is_apart for key in mix.keys)

    def own_pass(self, mix: Mix) -> OwnPass | None:
        """Return the model that a mix on the device runs in, where it is not the base."""
        return next((self._entries[key].own_pass for key in mix.keys if self._entries[key].own_pass), None)

    def close(self) -> None:
        """Stop reading."""
        self.loader.close()

    def check(self) -> None:
        """Verify that what is on the device has pages and a slot of its own."""
        resident = [entry for entry in self._entries.values() if entry.block is not None]
        slots = [entry.slot for entry in resident]
        assert sorted([*slots, *self._slots]) == list(range(self._num_slots)), "a slot is lost, or has two adapters"
        assert all(len(entry.block.pages) == entry.pages for entry in resident if entry.block)
        for key, entry in self._entries.items():
            named = any(info.key == key for info in self.infos.values())
            assert entry.users > 0 or named, "an adapter that nobody knows is kept"

    def _count_pages(self, source: Source, name: str) -> int:
        groups = self._group_all(source, name)
        units = sum(group.pairs.pages_for(_shapes(group, names, source)) for group, names in groups)
        pages = max(1, math.ceil(units / self.memory.units_per_page))
        if pages >= self.pool.num_pages:
            raise UnsupportedError(
                f"{name}: takes {pages} pages, but the cache has {self.pool.num_pages}; raise limits.cache_tokens"
            )
        return pages

    def _group_all(self, source: Source, name: str) -> list[tuple[LinearGroup, list[str]]]:
        """Return the groups of linears that a source has factors for, and all names of each group."""
        found: dict[str, tuple[LinearGroup, list[str]]] = {}
        for module in source.ranks:
            names = self.target.group_of(module)
            found[names[0]] = self._group(names, name), names
        return list(found.values())

    def _group(self, names: list[str], source: str) -> LinearGroup:
        if names[0] not in self._groups:
            widths = [self.target.widths(name, source) for name in names]
            sites = [self._site(name) for name in names]
            pairs = PagedPairs(self.memory.units, widths[0][0], [outputs for _, outputs in widths], self._num_slots)
            self._groups[names[0]] = LinearGroup(sites, names, pairs)
        return self._groups[names[0]]

    def _site(self, name: str) -> Site:
        return place_site(self.target, name, self.batch)

    def _place(self, entry: _Entry, contents: Contents) -> None:
        """Copy contents to the device."""
        entry.block, entry.slot = self.pool.allocate(entry.pages), self._slots.pop()
        units = self.memory.units_of(entry.block.pages)
        for group, names in self._group_all(entry.source, entry.source.key):
            pairs = [contents.pairs.get(name) for name in names]
            count = group.pairs.pages_for(pairs)
            group.pairs.place(entry.slot, pairs, units[:count])
            group.slots.add(entry.slot)
            entry.groups.append(group)
            del units[:count]
        device = self.memory.units.device
        for name, change in contents.changes.items():
            site = self._site(name)
            site.changes[entry.source.key] = change.to(device)
            entry.sites.append(site)
        entry.prefix, entry.own_pass = contents.prefix and contents.prefix.to(device), contents.own_pass
        entry.block.on_evict = lambda: self._evict(entry)
        self.num_placed += 1
        if device.type == "cpu" and not self.host.capacity:
            self.host.drop(entry.source.key)  # the device's memory is the host's

    def _evict(self, entry: _Entry) -> None:
        for group in entry.groups:
            group.pairs.clear(entry.slot)
            group.slots.remove(entry.slot)
        for site in entry.sites:
            del site.changes[entry.source.key]
        self._slots.append(entry.slot)
        entry.block, entry.slot, entry.groups, entry.sites = None, -1, [], []
        entry.prefix = entry.own_pass = None
        self.num_evicted += 1

    def _disown(self, name: str, key: str) -> None:
        """Let go of contents that a name no longer stands for, and of the folder that it brought, if it has others."""
        sources = self._entries[key].sources
        if len(sources) > 1:
            del sources[name]
        self._drop_unused(key)

    def _drop_unused(self, key: str) -> None:
        entry = self._entries.get(key)
        if entry is None or entry.users > 0 or any(info.key == key for info in self.infos.values()):
            return
        if entry.block is not None:
            block = entry.block
            self._evict(entry)
            self.pool.forget(block)
        self.host.drop(key)
        self.loader.forget(key)
        del self._entries[key]


def check_name(name: str) -> None:
    """Refuse a name that requests could not use.

    Raises:
        RequestError: why.
    """
    if not name or name in RESERVED or any(c in name for c in _FORBIDDEN) or not name.isprintable():
        raise RequestError(
            f"adapter name {name!r}: use printable characters, and neither {', '.join(RESERVED)} nor any of"
            f" {' '.join(_FORBIDDEN)}"
        )


def _is_alone(mix: Mix) -> bool:
    return len(mix.parts) == 1 and mix.parts[0][1] == 1


def _shapes(group: LinearGroup, names: Sequence[str], source: Source) -> list[Pair | None]:
    """Return factors of the right shapes without contents, for a source that has not been read."""
    inputs = group.pairs.widths[0]
    found: list[Pair | None] = []
    for name, outputs in zip(names, group.pairs.widths[1:], strict=True):
        rank = source.ranks.get(name, 0)
        gain = torch.empty(outputs, device="meta") if name in source.rescaled else None
        pair = Pair(torch.empty(rank, inputs, device="meta"), torch.empty(outputs, rank, device="meta"), gain)
        found.append(pair if rank else None)
    return found
