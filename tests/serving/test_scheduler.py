"""Pages and steps under random traffic, with the books checked after every step; no model is needed."""

from __future__ import annotations

import random

import pytest

from toolkit.errors import RequestError
from toolkit.serving.pages import PagePool
from toolkit.serving.request import Request, Sampling
from toolkit.serving.scheduler import Scheduler


def request(name: str, prompt: int, answer: int) -> Request:
    return Request(name, list(range(prompt)), None, Sampling(max_tokens=answer))


def run_step(scheduler: Scheduler) -> dict[str, int]:
    """Do what the engine does with a step's work, without a model."""
    work = scheduler.schedule()
    for w in work:
        assert w.count <= w.request.num_pending
        completes = w.completes
        w.request.num_computed += w.count
        if completes:
            w.request.output.append(0)
            if w.request.num_tokens == w.request.max_tokens:
                scheduler.finish(w.request)
    scheduler.check()
    return {w.request.id: w.count for w in work}


def test_pool_gives_pages_once_and_takes_them_back():
    pool = PagePool(5, 4)
    assert pool.allocate("a", 9) == [0, 1, 2]
    assert pool.can_allocate(8)
    assert not pool.can_allocate(9)
    assert pool.allocate("b", 1) == [3]
    pool.check()
    pool.free("a")
    pool.free("a")
    pool.check()
    assert pool.num_free == 4
    assert pool.allocate("c", 16) == [0, 1, 2, 4]


def test_check_sees_a_page_with_two_owners():
    pool = PagePool(3, 4)
    pool.allocate("a", 4)
    pool.allocate("b", 4)[0] = 0
    with pytest.raises(AssertionError, match="two owners"):
        pool.check()


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


def test_what_could_never_fit_is_refused_at_once():
    scheduler = Scheduler(PagePool(4, 4), max_batch_tokens=8, max_requests=2)
    with pytest.raises(RequestError, match="can come to 17 tokens, but the cache holds 16"):
        scheduler.add(request("x", 10, 7))
    with pytest.raises(ValueError, match="max_batch_tokens 1 is below max_requests 2"):
        Scheduler(PagePool(4, 4), max_batch_tokens=1, max_requests=2)


@pytest.mark.system("sarathi")
@pytest.mark.parametrize("seed", range(20))
def test_random_traffic(seed):
    rng = random.Random(seed)
    budget = rng.choice([4, 16, 64])
    scheduler = Scheduler(PagePool(rng.choice([12, 40]), rng.choice([1, 4])), budget, rng.randint(1, 4))
    room = scheduler.pool.num_pages * scheduler.pool.page_size
    everyone, started = [], []
    for i in range(60):
        prompt = rng.randint(1, max(1, room // 2))
        everyone.append(request(str(i), prompt, rng.randint(1, max(1, room - prompt))))
    arriving, decoding = list(everyone), set()
    for _ in range(20000):
        for _ in range(rng.choice([0, 0, 1, 3])):
            if arriving:
                scheduler.add(arriving.pop(0))
        if rng.random() < 0.02 and scheduler.running:
            scheduler.finish(rng.choice(scheduler.running))
        if rng.random() < 0.02 and scheduler.waiting:
            scheduler.finish(rng.choice(list(scheduler.waiting)))
        decoding = {r.id for r in scheduler.running if r.output}
        step = run_step(scheduler)
        assert sum(step.values()) <= budget
        assert all(step.get(name) == 1 for name in decoding), "a running answer missed a step"
        started += [name for name in step if name not in started]
        if not arriving and not scheduler.has_work:
            break
    assert not scheduler.has_work
    assert scheduler.pool.num_free == scheduler.pool.num_pages
    assert started == sorted(started, key=int), "prompts start in order of arrival"


@pytest.mark.system("sarathi")
def test_tokens_computed_do_not_depend_on_the_budget():
    totals = []
    for budget in (3, 7, 10_000):
        scheduler = Scheduler(PagePool(200, 4), budget, 3)
        for i, (prompt, answer) in enumerate([(5, 3), (40, 1), (1, 9), (17, 4)]):
            scheduler.add(request(str(i), prompt, answer))
        total = 0
        while scheduler.has_work:
            total += sum(run_step(scheduler).values())
        totals.append(total)
    assert totals == [5 + 40 + 1 + 17 + (3 + 1 + 9 + 4) - 4] * 3
