"""The plan: what fits which GPU, before anything is loaded."""

import math
import re
from pathlib import Path

import pytest

from turbo_nb import catalog
from turbo_nb.errors import InputError
from turbo_nb.machine import environment
from turbo_nb.machine.environment import Memory
from turbo_nb.machine.probe import free_memory
from turbo_nb.runtime import expert_swap
from turbo_nb.runtime.place import place
from turbo_nb.runtime.plan import GB, PLANS, USABLE, choose, sizes

SMALL, LARGE, I2V = (
    catalog.find(name)
    for name in ("TurboWan2.1-T2V-1.3B-480P", "TurboWan2.1-T2V-14B-720P", "TurboWan2.2-I2V-A14B-720P")
)


def plan_for(spec, gigabytes, quantized=False, **kwargs):
    width, height = spec.size
    weights = sizes(spec, quantized=quantized)
    return choose(weights, spec.arch, width, height, spec.num_frames, budget=gigabytes * GB, **kwargs)


@pytest.mark.parametrize(
    ("spec", "quantized", "gigabytes"),
    [(SMALL, False, 2.8), (SMALL, True, 1.4), (LARGE, False, 28.6), (LARGE, True, 14.5)],
)
def test_weights_are_as_large_as_the_released_files(spec, quantized, gigabytes):
    assert sizes(spec, quantized=quantized).transformer / GB == pytest.approx(gigabytes, rel=0.06)


@pytest.mark.parametrize(
    ("spec", "quantized", "gigabytes", "name"),
    [
        (SMALL, False, 80, "resident"),
        (SMALL, False, 24, "resident"),
        (SMALL, False, 16, "cpu-text"),
        (SMALL, True, 12, "cpu-text"),
        (LARGE, True, 80, "resident"),
        (LARGE, True, 32, "cpu-text"),
        (LARGE, True, 24, "offload-cpu-text"),
        (LARGE, True, 16, "group"),
        (LARGE, True, 10, "group"),
        (LARGE, False, 48, "cpu-text"),
        (I2V, True, 80, "resident"),
        (I2V, True, 48, "cpu-text"),
        (I2V, True, 32, "offload-cpu-text"),
        (SMALL, True, 6, "cpu-text"),
        (SMALL, True, 4.5, "offload-cpu-text"),
        (SMALL, True, 3.5, "offload-tiled"),
        (LARGE, False, 4, "group"),
    ],
)
def test_the_first_plan_that_fits(spec, quantized, gigabytes, name):
    plan = plan_for(spec, gigabytes, quantized)
    assert plan.name == name, str(plan)
    assert plan.fits or plan.name == PLANS[-1].name


@pytest.mark.parametrize(
    ("spec", "gigabytes", "name"), [(LARGE, 24, "group"), (I2V, 24, "group"), (I2V, 32, "offload-cpu-text")]
)
def test_without_the_fused_kernels_more_is_needed(spec, gigabytes, name):
    assert plan_for(spec, gigabytes, quantized=True, fused=False).name == name
    assert plan_for(spec, gigabytes, quantized=True).name != "group"


def test_less_memory_never_gets_a_hungrier_plan():
    needs = [plan_for(I2V, gigabytes, quantized=True).needs for gigabytes in (100, 60, 40, 30, 20, 10)]
    assert needs == sorted(needs, reverse=True)


def test_a_plan_says_what_it_does():
    assert str(plan_for(SMALL, 12, quantized=True)).startswith("plan cpu-text: needs ")
    assert "of 12.0 GB: text encoder in main memory" in str(plan_for(SMALL, 12, quantized=True))
    assert "may run out of memory" in str(plan_for(LARGE, 4))
    assert "everything stays loaded" in str(plan_for(SMALL, 80))
    assert "16 of 40 blocks stay on the GPU" in str(plan_for(LARGE, 16, quantized=True))


def test_a_plan_can_be_asked_for_by_name_even_if_it_is_too_large():
    plan = plan_for(LARGE, 4, name="resident")
    assert plan.name == "resident" and not plan.fits
    with pytest.raises(InputError, match="resident or free-text"):
        plan_for(SMALL, 4, name="group", device="cpu")


def test_on_a_cpu_only_the_text_encoder_can_go():
    assert plan_for(SMALL, 64, device="cpu").name == "resident"
    assert plan_for(SMALL, 13, device="cpu").name == "free-text"


@pytest.mark.parametrize(
    ("spec", "quantized", "gigabytes", "host", "name", "doubt"),
    [
        (SMALL, True, 12, 16, "cpu-text", None),
        (SMALL, True, 12, 8, "offload", None),  # the text encoder is too large for this machine, the expert is not
        (
            SMALL,
            True,
            8,
            8,
            "cpu-text",
            "takes 11.4 GB of main memory, of which 8.0 GB are free: take a machine",
        ),
        (I2V, True, 32, 16, "offload", "takes 29.3 GB of main memory, of which 16.0 GB are free"),
        (SMALL, False, 16, 8, "free-text", None),
        (LARGE, True, 32, 16, "cpu-text", None),
        (LARGE, True, 24, 16, "offload", None),
        (LARGE, True, 16, 16, "group", "takes 26.1 GB of main memory, of which 16.0 GB are free"),
        (LARGE, True, 16, 32, "group", None),
        (LARGE, False, 80, 1, "resident", None),
        (LARGE, False, 8, 64, "group", "may run out of memory"),
    ],
)
def test_what_a_plan_keeps_in_main_memory_must_fit_there(spec, quantized, gigabytes, host, name, doubt):
    plan = plan_for(spec, gigabytes, quantized, host_budget=host * GB)
    assert (plan.name, plan.fits) == (name, doubt is None), str(plan)
    assert "\n" not in str(plan) and (doubt in str(plan) if doubt else "; " not in str(plan))


def test_free_main_memory_heeds_the_containers_limit(monkeypatch):
    monkeypatch.setattr(environment, "memory", lambda: Memory(available=7, total=8))
    assert free_memory("cpu") == 7
    monkeypatch.setattr(environment, "memory", lambda: Memory(available=None, total=None))  # no /proc
    assert free_memory("cpu") > 7


def test_the_next_plan_frees_more_until_no_block_stays():
    told, plan = [], plan_for(SMALL, 80)
    while plan:
        told.append((plan.name, plan.needs))
        plan = plan.next
    assert [name for name, _ in told] == ["resident", "offload-tiled", "group"]
    assert [needs for _, needs in told] == sorted((needs for _, needs in told), reverse=True)
    assert plan_for(SMALL, 80).next == plan_for(SMALL, 80, name="offload-tiled")
    assert plan_for(SMALL, 64, device="cpu").next is None
    streamed = plan_for(LARGE, 16, quantized=True)
    assert (streamed.name, streamed.next.name, streamed.next.keep, streamed.next.next) == ("group", "group", 0, None)


@pytest.mark.parametrize("spec", [SMALL, LARGE, I2V])
@pytest.mark.parametrize("quantized", [False, True])
def test_as_many_blocks_stay_as_fit(spec, quantized):
    least = plan_for(spec, 0, quantized, name="group")
    assert least.keep == 0 and least.needs == plan_for(spec, 80, quantized).next.next.needs
    kept = []
    for gigabytes in range(1, 60):
        plan = plan_for(spec, gigabytes, quantized, name="group")
        kept.append(plan.keep)
        assert plan.blocks == spec.arch.num_layers and (plan.fits or plan.keep == 0)
        more = plan_for(spec, gigabytes + 60, quantized, name="group")
        block = sizes(spec, quantized=quantized).transformer / plan.blocks
        assert plan.keep in (0, plan.blocks) or plan.needs + block > 0.95 * gigabytes * GB
        assert more.keep == plan.blocks  # no cell for streamed blocks is needed then
    assert kept == sorted(kept) and {0, spec.arch.num_layers} < set(kept)


@pytest.mark.parametrize("file", ["docs/models.md", "docs/zh/models.md"])
def test_the_pages_have_the_calculated_memory(file):
    text, found, name = (Path(__file__).parents[2] / file).read_text(encoding="utf-8"), {}, None
    for model, linears, resident, streamed in re.findall(
        r"^\| (TurboWan\S+)? ?\| (bf16|int8) \| ([\d.]+) \| ([\d.]+) \|", text, re.M
    ):
        name = model or name
        found[name, linears == "int8"] = [float(resident), float(streamed)]
    spec = {spec.name: spec for spec in catalog.MODELS.values() if spec.files}
    assert found == {
        (name, quantized): [
            math.ceil(plan_for(spec[name], 0, quantized, name=plan).needs / USABLE / 1e8) / 10
            for plan in ("resident", "cpu-text")
        ]
        for name in spec
        for quantized in (False, True)
    }


def test_only_a_plan_that_fills_the_budget_is_tight():
    assert plan_for(LARGE, 24, quantized=True).is_tight and not plan_for(SMALL, 80).is_tight


class Recorder:
    """A pipeline that records what is asked of it"""

    def __init__(self, told, name=""):
        self._told, self._name = told, name

    def __getattr__(self, name):
        if name in ("transformer", "transformer_2", "vae"):
            return Recorder(self._told, name)
        return lambda *args, **kwargs: self._told.append(
            " ".join([self._name, name, *map(str, (*args, *kwargs.values()))])
        )


@pytest.mark.parametrize(
    ("name", "done"),
    [
        ("resident", {"transformer to cuda", "transformer_2 to cuda", "vae to cuda", "vae disable_tiling"}),
        ("offload", {"turns of transformer, transformer_2, vae on cuda, keep None", "vae disable_tiling"}),
        ("offload-tiled", {"turns of transformer, transformer_2, vae on cuda, keep None", "vae enable_tiling"}),
        ("group", {"turns of transformer, transformer_2, vae on cuda, keep 16", "vae enable_tiling"}),
    ],
)
def test_a_plan_is_carried_out(name, done, monkeypatch):
    told = []
    turns = lambda pipeline, modules, device, keep: told.append(  # noqa: E731
        f"turns of {', '.join(module._name for module in modules)} on {device}, keep {keep}"
    )
    monkeypatch.setattr(expert_swap, "enable", turns)
    place(Recorder(told), plan_for(I2V, 16, quantized=True, name=name))
    assert told[0] == " remove_all_hooks" and done <= set(told)
