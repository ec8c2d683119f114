"""What is on the device, on the host and on disk, and what a request sees of it."""

from __future__ import annotations

import gc
import random
import shutil
import threading
import time
from collections import OrderedDict

import pytest
import torch

from tests import tiny
from tests.serving.test_engine import ENOUGH, prompts_of
from toolkit.errors import CheckpointError, RequestError, UnsupportedError
from toolkit.kernels.grouped_lora import Pair
from toolkit.serving.adapters import folders
from toolkit.serving.adapters.contents import Contents
from toolkit.serving.adapters.tiers import MOST_COMING, HostTier, Loader
from toolkit.serving.engine import Engine
from toolkit.serving.mix import Mix, parse_model, show_model
from toolkit.serving.request import Sampling
from toolkit.serving.spec import Limits

GREEDY = Sampling(max_tokens=ENOUGH, ignore_eos=True)


def contents(size: int) -> Contents:
    return Contents({"x": Pair(torch.zeros(1, size), torch.zeros(0, 1))})


def simulate(trace: list[int], sizes: dict[int, int], capacity: int) -> tuple[int, int]:
    """Loads and evictions of a plain least-recently-used cache."""
    held: OrderedDict[int, int] = OrderedDict()
    loads = evictions = 0
    for key in trace:
        if key in held:
            held.move_to_end(key)
            continue
        loads += 1
        while held and sum(held.values()) + sizes[key] > capacity:
            held.popitem(last=False)
            evictions += 1
        held[key] = sizes[key]
    return loads, evictions


@pytest.mark.system("samba_coe")
@pytest.mark.parametrize("seed", range(5))
def test_host_tier_is_a_least_recently_used_cache_that_never_holds_too_much(seed):
    rng = random.Random(seed)
    sizes = {i: rng.randint(1, 9) for i in range(12)}
    trace = [rng.randrange(12) for _ in range(300)]
    loads = []
    for capacity in (9, 20, 40, 400):
        tier, count = HostTier(4 * capacity), 0
        for key in trace:
            if str(key) in tier:
                tier.get(str(key))
            else:
                count += 1
                tier.put(str(key), contents(sizes[key]))
            assert tier.nbytes == sum(c.nbytes for c in tier._held.values()) <= 4 * capacity
        assert count == simulate(trace, sizes, capacity)[0]
        loads.append(count)
    assert loads == sorted(loads, reverse=True), "a larger cache never misses more"
    assert loads[-1] == len(set(trace))


@pytest.mark.system("samba_coe")
@pytest.mark.parametrize("pages", [60, 90, 400])
def test_device_holds_what_was_used_last_and_answers_are_the_same(pages, base, loras, tmp_path):
    """One request after another: loads, hits and evictions are those of a least-recently-used cache of pages."""
    adapters = {f"a{i}": tiny.save_lora(base, tmp_path / str(i), seed=i, r=2 + i % 3) for i in range(5)}
    rng = random.Random(1)
    trace = [rng.randrange(5) for _ in range(40)]
    limits = Limits(page_size=4, cache_tokens=4 * pages, prefix_cache=False)
    with Engine(str(base), adapters, limits=limits) as engine:
        pool, infos = engine.scheduler.pool, engine.adapters.infos
        sizes = {i: infos[f"a{i}"].pages for i in range(5)}
        first: dict[int, list[int]] = {}
        for i in trace:
            engine.preload(f"a{i}")
            assert engine.adapters.nbytes <= engine.runner.memory.nbytes
        loads, evictions = simulate(trace, sizes, pages)
        assert (engine.adapters.num_placed, engine.adapters.num_evicted) == (loads, evictions)
        assert engine.adapters.num_hits == len(trace) - loads
        for i in trace[:10]:
            tokens = engine.generate([[1, 2, 3]], f"a{i}", Sampling(max_tokens=6, ignore_eos=True))[0].tokens
            assert first.setdefault(i, tokens) == tokens
        assert pool.num_free == pool.num_pages
        engine.check()
    for i, tokens in first.items():
        assert tokens == tiny.greedy(tiny.load_merged(base, adapters[f"a{i}"]), [1, 2, 3], 6)


@pytest.mark.system("s_lora")
def test_an_adapter_in_use_is_never_evicted(base, loras):
    limits = Limits(page_size=4, cache_tokens=240)
    with Engine(str(base), loras, limits=limits) as engine:
        ticket = engine.submit([1, 2, 3], "wide", Sampling(max_tokens=60, ignore_eos=True))
        while not ticket.request.output:
            engine.step()
        entry = engine.adapters._entries[engine.adapters.infos["wide"].key]
        others = [engine.submit([4, 5], name, Sampling(max_tokens=3)) for name in ("plain", "rslora", "dora", "few")]
        while engine.has_work:
            engine.step()
            engine.check()
            assert ticket.request.finished or entry.block is not None
        assert all(other.answer().tokens for other in others)
        assert engine.adapters.num_evicted > 0


@pytest.mark.system("blockllm")
def test_equal_tensors_of_fine_tunes_are_kept_once_and_go_with_the_last_one(base, tmp_path):
    model = tiny.load_merged(base, None)
    states = {}
    for name, layer in (("one", 0), ("two", 1), ("three", 0)):
        tuned = tiny.load_merged(base, None)
        with torch.no_grad():
            for parameter in (tuned.model.layers[2].mlp.down_proj.weight, tuned.model.layers[layer].mlp.up_proj.weight):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
        states[name] = tiny.save_model(tuned, tmp_path / name)
    with Engine(str(base), states) as engine:
        for name in states:
            engine.preload(name)
        matrix = model.model.layers[0].mlp.up_proj.weight.nbytes
        assert engine.adapters.shared.nbytes == 3 * matrix, "down_proj of all, up_proj of one and three, of two"
        assert engine.adapters.infos["one"].key != engine.adapters.infos["two"].key
        for gone, left in (("one", 3), ("two", 2), ("three", 0)):
            engine.remove_adapter(gone)
            gc.collect()
            assert engine.adapters.shared.nbytes == left * matrix


@pytest.mark.system("blockllm")
def test_a_fine_tune_on_the_base_gives_the_logits_of_the_fine_tune_alone(base, variants):
    """The chain of shared and own blocks is the model itself; two tenants in a batch change nothing."""
    prompt = prompts_of(1, seed=2)[0]
    rows = []
    for model, name in ((str(variants["tuned"]), "base"), (str(base), "tuned")):
        with Engine(model, {"tuned": variants["tuned"]} if name != "base" else {}) as engine:
            if name != "base":
                engine.preload(name)
            engine.submit(prompt, name)
            rows.append(engine.runner.run(engine.scheduler.schedule())[1][0])
    torch.testing.assert_close(rows[0], rows[1])  # a product may depend on where its factors lie in memory


def test_an_adapter_whose_folder_has_changed_is_an_error_and_others_go_on(base, loras, tmp_path):
    folder = shutil.copytree(loras["plain"], tmp_path / "x")
    with Engine(str(base), {"x": folder, "few": loras["few"]}) as engine:
        shutil.copytree(loras["wide"], folder, dirs_exist_ok=True)
        broken = engine.submit([1, 2], "x", GREEDY)
        fine = engine.submit([1, 2], "few", GREEDY)
        while engine.has_work:
            engine.step()
        with pytest.raises(RequestError, match="was changed since it was loaded; load it anew"):
            broken.answer()
        assert fine.answer().tokens == tiny.greedy(tiny.load_merged(base, loras["few"]), [1, 2], ENOUGH)
        engine.check()


def test_a_folder_that_has_not_changed_is_not_hashed_again(base, loras, tmp_path, monkeypatch):
    """Files whose times are old enough to tell are not read twice; one that was touched is."""
    folder = shutil.copytree(loras["plain"], tmp_path / "x")
    monkeypatch.setattr(folders, "SETTLED", -1.0)
    with Engine(str(base), {"x": folder}) as engine:
        source = engine.adapters._entries[engine.adapters.infos["x"].key].source
        hashed = []
        monkeypatch.setattr(source, "_look_again", lambda: hashed.append(1))
        source.read()
        assert not hashed
        (folder / "adapter_config.json").touch()
        source.read()
        assert hashed


def test_a_folder_that_was_written_just_now_is_hashed_again(base, loras, tmp_path):
    """Its times may be those of the write before."""
    folder = shutil.copytree(loras["plain"], tmp_path / "x")
    (folder / "adapter_config.json").touch()
    assert not folders.Stamp([folder / "adapter_config.json"]).holds()


def test_names_of_equal_contents_do_not_depend_on_the_folder_of_another(base, loras, tmp_path):
    """Two folders with the same bytes are one content; it is read from the one that still has it."""
    folder = shutil.copytree(loras["plain"], tmp_path / "x")
    with Engine(str(base), {"x": folder, "y": loras["plain"]}) as engine:
        shutil.copytree(loras["wide"], folder, dirs_exist_ok=True)
        expected = tiny.greedy(tiny.load_merged(base, loras["plain"]), [1, 2], ENOUGH)
        assert engine.generate([[1, 2]], "y", GREEDY)[0].tokens == expected
        engine.adapters.remove("x")
        assert engine.generate([[1, 2]], "y", GREEDY)[0].tokens == expected
        engine.check()


def test_a_folder_that_goes_while_it_is_read_is_no_loss_to_another_name(base, loras, tmp_path, monkeypatch):
    folder = shutil.copytree(loras["plain"], tmp_path / "x")
    with Engine(str(base), {"x": folder, "y": loras["plain"]}) as engine:
        going, _ = engine.adapters._entries[engine.adapters.infos["y"].key].sources.values()
        asked = []

        def vanished() -> Contents:
            asked.append(True)
            raise FileNotFoundError(2, "No such file or directory", str(folder))

        monkeypatch.setattr(going, "read", vanished)
        expected = tiny.greedy(tiny.load_merged(base, loras["plain"]), [1, 2], ENOUGH)
        assert engine.generate([[1, 2]], "y", GREEDY)[0].tokens == expected
        assert asked


def test_an_adapter_is_read_while_others_are_answered(base, loras, monkeypatch):
    """A slow disk holds up the requests for its adapter, and nobody else."""
    gate = threading.Event()
    with Engine(str(base), loras) as engine:
        source = engine.adapters._entries[engine.adapters.infos["wide"].key].source
        read = source.read
        monkeypatch.setattr(source, "read", lambda: gate.wait(20) and read())
        slow = engine.submit([1, 2, 3], "wide", GREEDY)
        quick = engine.submit([1, 2, 3], "base", GREEDY)
        while quick.request.finished is None:
            engine.step()
        assert not slow.request.output
        gate.set()
        while engine.has_work:
            engine.step()
        assert slow.answer().tokens == tiny.greedy(tiny.load_merged(base, loras["wide"]), [1, 2, 3], ENOUGH)


def test_adapters_of_those_who_wait_are_read_while_the_batch_is_full(base, loras):
    names = ["plain", "few", "wide"]
    with Engine(str(base), loras, limits=Limits(max_requests=1)) as engine:
        tickets = [engine.submit([1, 2], name, GREEDY) for name in names]
        while not tickets[0].request.output:
            engine.step()
        loader = engine.adapters.loader
        assert loader.num_loads + len(loader._coming) == 3, "all of them are read, or have been"
        while engine.has_work:
            engine.step()
        assert engine.adapters.loader.num_loads == 3
        engine.check()


def test_loader_reads_what_a_request_needs_all_or_none():
    gate = threading.Event()

    def read(key: str) -> Contents:
        gate.wait(20)
        if key == "bad":
            raise OSError("planted")
        return contents(1)

    loader = Loader()
    loader.ask([str(i) for i in range(MOST_COMING - 1)], read)
    loader.ask(["a", "b"], read)
    assert set(loader._coming) == {str(i) for i in range(MOST_COMING - 1)}, "half of a pair helps nobody"
    loader.forget("0")
    loader.ask(["bad", "b"], read)
    gate.set()
    for _ in range(400):
        loader.wait(0.05)
        if found := loader.collect(["bad", "b"]):
            break
        time.sleep(0.01)
    assert set(found) == {"b"}
    assert loader.failures == {"bad": "an adapter could not be read: planted"}
    loader.close()


def test_time_that_a_request_allows(base, loras):
    with Engine(str(base), loras, limits=Limits(max_requests=1)) as engine:
        long = engine.submit([1], "plain", Sampling(max_tokens=200, ignore_eos=True))
        late = engine.submit([1], "base", Sampling(max_tokens=5), timeout=0.02)
        time.sleep(0.03)
        engine.step()
        assert late.request.finished == "error"
        with pytest.raises(RequestError, match="the time that the request allowed is over"):
            late.answer()
        assert long.request.finished is None
        engine.cancel(long)
        engine.check()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("plain+nobody", "no model 'nobody'"),
        ("plain:x", "'plain:x' is no adapter with a weight"),
        ("plain:nan", "is no adapter with a weight"),
        ("plain:1e9", "from -100 to 100"),
        (":2", "is no adapter with a weight"),
        ("plain+", "is no adapter with a weight"),
        ("base+plain", "no model 'base'"),
        ("dora:0.5", "can neither be weighted nor combined"),
        ("plain+dora", "can neither be weighted nor combined"),
        ("+".join(["plain"] * 17), "17 adapters, at most 16"),
    ],
)
def test_compositions_that_are_none(model, message, base, loras):
    with Engine(str(base), loras) as engine:
        with pytest.raises(RequestError, match=message):
            engine.submit([1], model)
        assert not engine.has_work
        engine.check()


def test_names_of_compositions():
    assert parse_model("a:0.6+b") == (("a", 0.6), ("b", 1.0))
    assert parse_model(show_model([("a", 0.1 + 0.2), ("b", 1.0)])) == (("a", 0.1 + 0.2), ("b", 1.0))
    assert show_model([]) == "base"
    assert Mix.of([("k", 1.0), ("j", 2.0), ("k", -1.0)]) == Mix((("j", 2.0),))
    assert Mix.of([("b", 1.0), ("a", 2.0)]).identity == Mix.of([("a", 2.0), ("b", 1.0)]).identity
    assert Mix.of([("a", 2.0)]).identity != Mix.of([("a", 2.5)]).identity


def test_an_adapter_larger_than_the_cache_is_refused(base, loras):
    with pytest.raises(UnsupportedError, match=r"takes \d+ pages, but the cache has 8; raise limits.cache_tokens"):
        Engine(str(base), {"wide": loras["wide"]}, limits=Limits(page_size=4, cache_tokens=32))


def test_a_prefix_cannot_be_embedded_nor_combined(base, variants):
    with Engine(str(base), {"prefix": variants["prefix"], "plain": variants["plain"]}) as engine:
        with pytest.raises(RequestError, match="has no forward pass of its own"), engine.using("prefix"):
            pass
        with pytest.raises(RequestError, match="neither be weighted nor combined"):
            engine.submit([1], "prefix+plain")
        with pytest.raises(RequestError, match="5 tokens of the adapter, 250 prompt tokens and 3 to generate"):
            engine.submit([1] * 250, "prefix", Sampling(max_tokens=3))


def test_a_fine_tune_of_another_base_is_refused(base, tmp_path):
    other = tiny.save_model(tiny.llama(hidden_size=32), tmp_path / "other")
    with pytest.raises(CheckpointError, match="in the served model it is"):
        Engine(str(base), {"other": other})
    layers = tiny.save_model(tiny.llama(num_hidden_layers=2), tmp_path / "layers")
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\..*, so it is no fine-tune"):
        Engine(str(base), {"layers": layers})
