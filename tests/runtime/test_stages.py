"""Stages: timed, and run again with the next plans when memory runs out."""

from dataclasses import replace

import pytest
import torch

from turbo_nb.errors import TurboNbError, TurboNbWarning
from turbo_nb.runtime.plan import Plan
from turbo_nb.runtime.stages import StageRunner

SMALL = Plan(name="group", text_encoder="cpu", offload="group", vae_tiling=True, device="cpu")
LARGE = Plan(name="resident", text_encoder="resident", offload="none", vae_tiling=False, device="cpu", next=SMALL)


class Model:
    def __init__(self, plan=LARGE, graphs=0):
        self.plan, self.followed, self.graphs = plan, [], graphs

    def drop_graphs(self):
        had, self.graphs = self.graphs, 0
        return bool(had)

    def follow(self, plan):
        self.followed.append(plan)
        self.plan = plan


class Work:
    """Runs out of memory so many times"""

    def __init__(self, failures):
        self.failures, self.calls = failures, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise torch.OutOfMemoryError("full")
        return "result"


def test_stages_are_announced_and_timed():
    names, runner = [], None
    runner = StageRunner(Model(), names.append)
    assert runner.run("text", lambda: 1) == 1 and runner.run("denoise", lambda: 2) == 2
    assert names == ["text", "denoise"] and list(runner.timings) == names and runner.peaks == {}


MIDDLE = replace(LARGE, name="offload", offload="model")
CHAIN = replace(LARGE, next=MIDDLE)  # resident → offload → group


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_takes_the_next_plan_until_one_suffices(failures):
    model, work = Model(CHAIN), Work(failures)
    runner = StageRunner(model)
    with pytest.warns(TurboNbWarning, match="out of memory while at decode; going on with plan") as told:
        assert runner.run("decode", work) == "result"
    assert (model.followed, work.calls, len(told)) == ([MIDDLE, SMALL][:failures], failures + 1, failures)
    with pytest.warns(TurboNbWarning) if failures == 1 else pytest.raises(TurboNbError, match="text, with plan group"):
        assert runner.run("text", Work(1)) == "result"
    assert model.followed == [MIDDLE, SMALL]


def test_out_of_memory_with_every_plan_names_the_smallest_one():
    with pytest.warns(TurboNbWarning), pytest.raises(TurboNbError, match=r"with plan group\. Take fewer frames"):
        StageRunner(Model(CHAIN)).run("denoise", Work(3))


def test_a_plan_that_cannot_be_followed_is_left_for_the_next_one(monkeypatch):
    model, follow = Model(CHAIN), Model.follow

    def full(self, plan):
        follow(self, plan)
        if plan is MIDDLE:
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Model, "follow", full)
    with pytest.warns(TurboNbWarning):
        assert StageRunner(model).run("text", work := Work(1)) == "result"
    assert (model.followed, work.calls) == ([MIDDLE, SMALL], 2)


def test_without_a_next_plan_the_error_comes_at_once():
    model = Model(SMALL)
    with pytest.raises(TurboNbError, match="while at text, with plan group"):
        StageRunner(model).run("text", Work(1))
    assert model.followed == []


def test_another_error_passes_through():
    with pytest.raises(KeyError):
        StageRunner(Model()).run("text", lambda: {}["missing"])


def test_out_of_memory_drops_graphs_before_it_takes_the_next_plan():
    model, work = Model(graphs=1), Work(1)
    assert StageRunner(model).run("decode", work) == "result"
    assert (model.followed, work.calls) == ([], 2)
    with pytest.warns(TurboNbWarning, match="going on with plan group"):
        assert StageRunner(Model(graphs=1)).run("decode", Work(2)) == "result"


@pytest.mark.parametrize(("needs", "asked"), [(1.0, True), (0.1, False)])
def test_a_tight_plan_gives_cached_memory_back_before_each_stage(needs, asked, monkeypatch):
    told = []
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: told.append(name))
    model = Model(replace(LARGE, device="cuda", needs=needs, budget=1.0, next=None))
    StageRunner(model).run("decode", lambda: told.append("work") or 1)
    assert told == ["empty_cache"] * asked + [
        "reset_peak_memory_stats",
        "work",
        "synchronize",
        "max_memory_allocated",
    ]
