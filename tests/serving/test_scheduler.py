"""Steps under random traffic, with the books and what every token sees checked after each; no model is needed."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.serving.traffic import Adapters, Device, request, run_step
from toolkit.errors import RequestError
from toolkit.serving.pages import PagePool
from toolkit.serving.preemption import SwapSpace, runs
from toolkit.serving.prefix import PrefixCache
from toolkit.serving.scheduler import Scheduler


def finish_all(scheduler: Scheduler, device: Device | None = None) -> list[dict[str, int]]:
    steps = []
    while scheduler.has_work:
        steps.append(run_step(scheduler, device))
        assert len(steps) < 10_000, "no end"
    return steps


def test_answers_go_first_and_long_prompts_in_chunks():
    scheduler = Scheduler(PagePool(100, 4), max_batch_tokens=8, max_requests=4)
    short, long = request("short", 3, 5), request("long", 20, 2)
    scheduler.add(short)
    scheduler.add(long)
    assert run_step(scheduler) == {"short": 3, "long": 5}
    assert run_step(scheduler) == {"short": 1, "long": 7}
    assert run_step(scheduler) == {"short": 1, "long": 7}
    assert run_step(scheduler) == {"short": 1, "long": 1}
    assert run_step(scheduler) == {"short": 1, "long": 1}
    assert not scheduler.has_work


def test_first_in_line_is_not_overtaken():
    scheduler = Scheduler(PagePool(10, 4), max_batch_tokens=64, max_requests=8)
    for item in (request("a", 20, 4), request("big", 30, 8), request("small", 2, 2)):
        scheduler.add(item)
    assert run_step(scheduler) == {"a": 20}
    while "big" not in (step := run_step(scheduler)):
        assert set(step) == {"a"}


@pytest.mark.system("s_lora")
def test_what_could_never_fit_is_refused_at_once():
    pool = PagePool(4, 4)
    scheduler = Scheduler(pool, 8, 2, adapters=Adapters(pool, {"big": 3}))
    with pytest.raises(RequestError, match="can come to 17 tokens, but the cache holds 16"):
        scheduler.add(request("x", 10, 7))
    with pytest.raises(
        RequestError, match=r"5 tokens, but the cache holds 16 beside the adapters .* take 3 of its pages"
    ):
        scheduler.add(request("x", 3, 2, "big"))
    scheduler.add(request("x", 3, 1, "big"))
    finish_all(scheduler)
    with pytest.raises(ValueError, match="max_batch_tokens 1 is below max_requests 2"):
        Scheduler(PagePool(4, 4), max_batch_tokens=1, max_requests=2)


@pytest.mark.system("sarathi")
@pytest.mark.system("s_lora")
@pytest.mark.system("fastswitch")
@pytest.mark.parametrize("seed", range(40))
def test_random_traffic(seed):
    rng = random.Random(seed)
    budget = rng.choice([4, 16, 64])
    pool = PagePool(rng.choice([12, 40]), rng.choice([1, 4]))
    device, sizes = Device(pool), {name: rng.randint(1, 4) for name in "abcdef"}
    adapters = Adapters(pool, sizes, delay=rng.choice([0, 3]))
    swap = SwapSpace(device, rng.choice([3, 50])) if rng.random() < 0.5 else None
    scheduler = Scheduler(pool, budget, rng.randint(1, 4), adapters=adapters, prefixes=PrefixCache(pool), swap=swap)
    everyone = []
    for i in range(60):
        adapter = rng.choice(["", *sizes])
        room = pool.capacity - sizes.get(adapter, 0) * pool.page_size
        prompt = rng.randint(1, max(1, room // 2))
        shared = [0] * rng.randint(0, prompt)  # many begin alike
        tokens = shared + [rng.randrange(3) for _ in range(prompt - len(shared))]
        answer = rng.randint(1, max(1, room - prompt))
        everyone.append(
            request(str(i), tokens, answer, adapter, key=rng.choice("xyz"), priority=rng.choice([0, 0, 0, 5]))
        )
    arriving, cancelled = list(everyone), set()
    for _ in range(20000):
        for _ in range(rng.choice([0, 0, 1, 3])):
            if arriving:
                scheduler.add(arriving.pop(0))
        for requests in (scheduler.running, list(scheduler.waiting)):
            if rng.random() < 0.02 and requests:
                gone = rng.choice(requests)
                cancelled.add(gone)
                scheduler.finish(gone)
        decoding = {r.id for r in scheduler.running if r.output and r.num_pending == 1}
        step = run_step(scheduler, device)
        assert sum(step.values()) <= budget
        missed = decoding - set(step)
        assert not missed & {r.id for r in scheduler.running}, "a running answer missed a step"
        if not arriving and not scheduler.has_work:
            break
    assert not scheduler.has_work
    assert pool.num_free == pool.num_pages
    assert all(r.finished == "length" for r in everyone if r not in cancelled), "somebody starved"
    assert not (swap and swap.num_pages)
    assert not scheduler.prefixes._coming


@pytest.mark.system("sarathi")
def test_tokens_computed_do_not_depend_on_the_budget():
    totals = []
    for budget in (3, 7, 10_000):
        scheduler = Scheduler(PagePool(200, 4), budget, 3)
        for i, (prompt, answer) in enumerate([(5, 3), (40, 1), (1, 9), (17, 4)]):
            scheduler.add(request(str(i), prompt, answer))
        totals.append(sum(sum(step.values()) for step in finish_all(scheduler)))
    assert totals == [5 + 40 + 1 + 17 + (3 + 1 + 9 + 4) - 4] * 3


@pytest.mark.system("flover")
def test_request_that_arrives_starts_in_the_next_step_and_nothing_waits_in_between():
    scheduler = Scheduler(PagePool(100, 4), max_batch_tokens=64, max_requests=3)
    lengths = [(4, 5), (3, 2), (6, 7), (2, 4)]
    for i, (prompt, answer) in enumerate(lengths[:3]):
        scheduler.add(request(str(i), prompt, answer))
    first = run_step(scheduler)
    assert first == {"0": 4, "1": 3, "2": 6}
    scheduler.add(request("3", 2, 4))
    steps = [first, *finish_all(scheduler)]
    # Three places: the fourth starts when the shortest ends, after 2 steps, and needs 4.
    assert [next(i for i, step in enumerate(steps) if str(n) in step) for n in range(4)] == [0, 0, 0, 2]
    assert len(steps) == max(5, 7, 2 + 4)


def trie_nodes(prompts: list[list[int]]) -> int:
    return len({tuple(prompt[: i + 1]) for prompt in prompts for i in range(len(prompt))})


@pytest.mark.system("batchllm")
@pytest.mark.parametrize("seed", range(8))
def test_tokens_of_prompts_that_begin_alike_are_computed_once(seed):
    """With pages of one token they are the nodes of the trie, but for last tokens, whose logits are needed."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(2) for _ in range(rng.randint(2, 9))] for _ in range(12)]
    pool = PagePool(400, 1)
    device, scheduler = Device(pool), Scheduler(pool, 64, 12, prefixes=PrefixCache(pool))
    for i, prompt in enumerate(prompts):
        scheduler.add(request(str(i), prompt, 1))
    computed = sum(sum(step.values()) for step in finish_all(scheduler, device))
    inner = trie_nodes([prompt[:-1] for prompt in prompts])
    again = sum(1 for i, p in enumerate(prompts) if any(q[: len(p)] == p and len(q) > len(p) for q in prompts))
    assert trie_nodes(prompts) <= computed <= inner + len(prompts)
    assert computed - trie_nodes(prompts) <= again + len(prompts) - len({tuple(p) for p in prompts})
    assert pool.num_free == 400


@pytest.mark.system("batchllm")
def test_prompts_of_two_adapters_share_nothing():
    pool = PagePool(100, 2)
    scheduler = Scheduler(pool, 64, 8, adapters=Adapters(pool, {"a": 1, "b": 1}), prefixes=PrefixCache(pool))
    device, prompt = Device(pool), list(range(9))
    for name, adapter in (("1", "a"), ("2", "b"), ("3", ""), ("4", "a")):
        scheduler.add(request(name, prompt, 2, adapter))
    steps = finish_all(scheduler, device)
    assert steps[0] == {"1": 9, "2": 9, "3": 9}
    assert steps[1] == {"1": 1, "2": 1, "3": 1, "4": 1}, "the fourth found all full pages but its last token's"
    assert (scheduler.prefixes.num_hits, scheduler.prefixes.num_lookups) == (8, 36)


def test_prompt_whose_logits_are_asked_for_is_computed_whole():
    pool = PagePool(100, 2)
    scheduler = Scheduler(pool, 64, 8, prefixes=PrefixCache(pool))
    scheduler.add(request("1", 9, 1))
    finish_all(scheduler)
    scored = request("2", 9, 1)
    scored.sampling = type(scored.sampling)(max_tokens=1, prompt_logprobs=0)
    scheduler.add(scored)
    assert run_step(scheduler) == {"2": 9}


def test_a_request_that_takes_the_last_page_pushes_out_the_latest():
    pool = PagePool(6, 2)
    scheduler = Scheduler(pool, 64, 4)
    first, second = request("first", 3, 7), request("second", 3, 5)
    scheduler.add(first)
    scheduler.add(second)
    finish_all(scheduler)
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert (first.finished, second.finished) == ("length", "length")


def test_lower_priority_value_starts_first_and_pushes_others_out():
    scheduler = Scheduler(PagePool(10, 2), max_batch_tokens=64, max_requests=2)
    late, batch = request("late", 4, 8, priority=9), request("batch", 4, 8, priority=9)
    scheduler.add(late)
    scheduler.add(batch)
    run_step(scheduler)
    urgent = request("urgent", 6, 4, priority=-1)
    scheduler.add(urgent)
    assert set(run_step(scheduler)) == {"late", "urgent"}
    assert batch.num_preemptions == 1
    finish_all(scheduler)
    assert batch.finished == "length"


def test_request_waits_for_its_adapter_and_holds_nobody_up():
    pool = PagePool(40, 2)
    adapters = Adapters(pool, {"slow": 2}, delay=3)
    scheduler = Scheduler(pool, 64, 4, adapters=adapters)
    scheduler.add(request("waits", 4, 2, "slow"))
    scheduler.add(request("goes", 4, 5))
    steps = finish_all(scheduler)
    assert [set(step) for step in steps] == [{"goes"}] * 3 + [{"goes", "waits"}] * 2


@pytest.mark.parametrize("many", ["key", "adapter"])
def test_one_who_asks_much_does_not_hold_up_the_others(many):
    """Two ask at once, one of them for twenty times as much: until the other's is done, both get about the same."""
    pool = PagePool(400, 4)
    scheduler = Scheduler(pool, 16, 2, adapters=Adapters(pool, {"a": 1, "b": 1}))
    greedy = {"key": "greedy"} if many == "key" else {"adapter": "a"}
    modest = {"key": "modest"} if many == "key" else {"adapter": "b"}
    for i in range(60):
        scheduler.add(request(f"g{i}", 8, 4, **greedy))
    for i in range(3):
        scheduler.add(request(f"m{i}", 8, 4, **modest))
    given = {"g": 0, "m": 0}
    while any(r.id[0] == "m" for r in (*scheduler.waiting, *scheduler.running)):
        for name, count in run_step(scheduler).items():
            given[name[0]] += count
    assert given["m"] == 3 * (8 + 3)
    assert given["g"] <= 2 * given["m"]


def test_who_was_away_has_no_claim_to_what_was_missed():
    scheduler = Scheduler(PagePool(400, 4), 16, 1)
    for i in range(20):
        scheduler.add(request(f"a{i}", 8, 2, key="a"))
    for _ in range(20):
        run_step(scheduler)
    for i in range(20):
        scheduler.add(request(f"b{i}", 8, 2, key="b"))
    order = [name for step in finish_all(scheduler) for name, count in step.items() if count == 8]
    longest = max(len(list(group)) for _, group in itertools.groupby(order[:20], key=lambda name: name[0]))
    assert longest <= 2, "they take turns from the moment on in which both are there"


@pytest.mark.system("fastswitch")
def test_second_time_moves_only_what_was_written_since_in_one_transfer_per_run():
    pool = PagePool(20, 2)
    device = Device(pool)
    swap = SwapSpace(device, 20)
    scheduler = Scheduler(pool, 64, 4, swap=swap)
    item = request("x", 7, 9)
    scheduler.add(item)
    for _ in range(3):
        run_step(scheduler, device)
    assert item.num_computed == 9
    scheduler._preempt(item)
    assert (swap.num_moved, swap.num_transfers, swap.num_pages) == (5, 1, 5)
    for _ in range(3):
        run_step(scheduler, device)
    assert item.num_computed == 12
    moved = swap.num_moved
    scheduler._preempt(item)
    assert swap.num_moved - moved == 2, "four pages were full the first time, and the fifth was not"
    assert sum(sum(step.values()) for step in finish_all(scheduler, device)) == 7 + 9 - 1 - 12, "nothing anew"
    assert swap.num_pages == 0
    assert runs([3, 4, 5, 9, 2, 1, 0, 1]) == [(3, 3), (9, 1), (2, 1), (1, 1), (0, 2)]


def test_swap_space_that_is_full_means_computing_anew():
    pool = PagePool(20, 2)
    device = Device(pool)
    scheduler = Scheduler(pool, 64, 4, swap=SwapSpace(device, 2))
    item = request("x", 7, 9)
    scheduler.add(item)
    run_step(scheduler, device)
    scheduler._preempt(item)
    assert run_step(scheduler, device) == {"x": 8}


def test_check_sees_a_waiting_request_that_holds_pages():
    scheduler = Scheduler(PagePool(4, 4), 8, 2)
    item = request("x", 3, 1)
    scheduler.add(item)
    item.blocks.append(scheduler.pool.allocate(1))
    with pytest.raises(AssertionError, match="does not run holds pages"):
        scheduler.check()
