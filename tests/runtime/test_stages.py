"""Stages: timed, and run once more with the next plan when memory runs out."""

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


def test_out_of_memory_takes_the_next_plan_once():
    model, work = Model(), Work(1)
    runner = StageRunner(model)
    with pytest.warns(TurboNbWarning, match="out of memory while at decode; going on with plan group"):
        assert runner.run("decode", work) == "result"
    assert (model.followed, work.calls) == ([SMALL], 2)
    with pytest.raises(TurboNbError, match="while at decode, with plan group"):
        runner.run("decode", Work(1))
    assert model.followed == [SMALL]


def test_out_of_memory_with_both_plans_names_the_smaller_one():
    with pytest.warns(TurboNbWarning), pytest.raises(TurboNbError, match=r"with plan group\. Take fewer frames"):
        StageRunner(Model()).run("denoise", Work(2))


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
