"""Launches fit each card, the best one is chosen twice, and what is kept on disk is believed only where it was made."""

import json

import pytest
import torch

from turbo_nb.machine import environment, probe
from turbo_nb.machine.probe import Gpu, Library, Machine
from turbo_nb.ops import tuning
from turbo_nb.ops.tuning import Launch, Measured

KERNELS = [
    ("sla", (128, 128, 64)), ("sla", (64, 128, 64)), ("sagesla", (128, 128, 64)), ("linear_state", (128,)),
    ("cross", (128,)), ("row_product", (1536, 8960)), ("row_product", (13824, 5120)),
    *(("conv", shape) for shape in [(96, 96), (192, 192), (3, 96), (384, 384), (384, 16), (768, 384)]),
]  # fmt: skip
FAST, SLOW = Launch((1,), 4, 2), Launch((2,), 8, 2)


@pytest.mark.parametrize("arch", tuning.SHARED, ids="sm_{0[0]}{0[1]}".format)
def test_every_kernel_has_launches_that_fit_a_card(arch):
    for kernel, shape in KERNELS:
        found = tuning.candidates(kernel, shape, arch)
        assert 2 <= len(found) <= 4, (kernel, shape, found)
        assert all(tuning.shared_memory(kernel, shape, how, arch) <= tuning.SHARED[arch] * 1024 for how in found)


def test_smaller_shared_memory_leaves_fewer_launches():
    every = tuning.candidates("row_product", (1536, 1536), (8, 0))
    fewer = tuning.candidates("row_product", (1536, 1536), (8, 6))
    assert set(fewer) < set(every)
    assert tuning.candidates("row_product", (1536, 1536), (8, 0), 99 * 1024) == fewer  # what the driver says counts


def test_hopper_keeps_its_launches_first():
    first = {kernel: tuning.candidates(*kernel, (9, 0))[0] for kernel in KERNELS}
    assert first["sla", (128, 128, 64)] == first["sagesla", (128, 128, 64)] == Launch((2,), 8, 2)
    assert first["linear_state", (128,)] == Launch((64,), 4, 3) and first["cross", (128,)] == Launch((64, 64), 4, 3)
    assert first["row_product", (1536, 8960)] == Launch((128, 256, 128, 1), 8, 3)
    assert first["conv", (96, 96)] == Launch((256, 64, 32, 32), 8, 4)
    assert first["conv", (192, 192)] == Launch((128, 128, 64, 64), 8, 3)
    assert first["conv", (3, 96)] == Launch((256, 16, 0, 32), 8, 3)
    assert first["conv", (384, 384)] == first["conv", (768, 384)] == Launch((256, 128, 0, 64), 8, 3)


def test_the_depth_of_a_convolution_divides_its_channels():
    for channels in (16, 48, 96, 160, 384):
        for how in tuning.candidates("conv", (384, channels), (8, 9)):
            assert channels % how.tile[3] == 0 and how.tile[3] >= 16


def test_where_nothing_fits_the_smallest_launch_is_left():
    (only,) = tuning.candidates("sla", (128, 128, 64), (8, 6), 1024)
    assert only == min(tuning.SLA[8], key=lambda how: tuning.shared_memory("sla", (128, 128, 64), how, (8, 6)))


def test_an_unknown_card_gets_launches_for_the_least_shared_memory():
    assert tuning.candidates("cross", (128,), (13, 0)) == tuning.candidates("cross", (128,), (12, 0))


@pytest.mark.parametrize(
    ("times", "expected"),
    [({SLOW: 1.0, FAST: 0.98}, SLOW), ({SLOW: 1.0, FAST: 0.9}, FAST), ({SLOW: 1.0, FAST: 1.5}, SLOW)],
)
def test_an_earlier_launch_stays_unless_another_is_clearly_faster(times, expected):
    assert tuning.best(times) == expected


@pytest.fixture
def card(monkeypatch):
    """A machine with an RTX 4090, whose facts a test can change; a new process each time that it is called"""

    def use(**facts) -> None:
        gpu = Gpu(facts.pop("name", "NVIDIA GeForce RTX 4090"), (8, 9))
        machine = Machine(
            gpu=gpu.name, gpu_count=1, arch=gpu.arch, gpus=(gpu,), compiler=None,
            **{"driver": "570.1", "torch": "2.11.0", "cuda": "13.0", "libraries": {"triton": Library(version="3.6.0")}}
            | facts,
        )  # fmt: skip
        monkeypatch.setattr(probe, "probe", lambda device=None: machine)
        monkeypatch.setattr(tuning, "_winners", {})

    monkeypatch.setattr(tuning, "_card", lambda gpu: ((8, 9), 99 * 1024))
    tuning._candidates.cache_clear()
    use()
    yield use
    tuning._candidates.cache_clear()


class On0(torch.Tensor):
    """A tensor that says that it is on GPU 0"""

    def get_device(self):
        return 0


X, KEY = torch.zeros(1).as_subclass(On0), ("sla", (128, 128, 64))
WINNER = {KEY: Measured(FAST, {SLOW: 2.0, FAST: 1.0})}


def test_a_winner_is_used_and_kept_for_the_next_process(card):
    ran = []
    assert tuning.chosen(*KEY, X) == SLOW  # nothing was measured yet
    tuning.remember(0, WINNER)
    for _ in range(2):
        tuning.run(*KEY, X, lambda how: ran.append(how))
        card()
    assert ran == [FAST, FAST] and tuning.winners(0) == WINNER
    tuning.remember(0, {("cross", (128,)): Measured(SLOW, {SLOW: 1.0})})
    assert tuning.winners(0)[KEY] == WINNER[KEY]  # a later kernel leaves it


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "NVIDIA L4"},
        {"driver": "580.1"},
        {"torch": "2.12.0"},
        {"libraries": {"triton": Library(version="3.7")}},
    ],
    ids=str,
)
def test_a_winner_of_other_circumstances_is_not_used(card, changed):
    tuning.remember(0, WINNER)
    card(**changed)
    assert tuning.winners(0) == {} and tuning.chosen(*KEY, X) == SLOW


def test_a_winner_of_another_version_or_other_candidates_is_not_used(card, monkeypatch):
    tuning.remember(0, WINNER)
    for owner, name, value in [(environment, "version", lambda name: "99"), (tuning, "CONV", {})]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            card()
            assert tuning.winners(0) == {}
        card()
        assert tuning.winners(0) == WINNER


@pytest.mark.parametrize(
    "fact", [7, [7], [["sla", 1, 2, 3]], [["sla", [128], ["x"], []]], {"sla": 1}, "works"], ids=str
)
def test_a_damaged_file_is_ignored(card, fact):
    tuning.remember(0, WINNER)
    (path,) = (environment.cache() / "facts").glob("launches-*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fact": fact}))
    card()
    assert tuning.winners(0) == {} and tuning.chosen(*KEY, X) == SLOW
    path.write_bytes(b"\0not json")
    card()
    assert tuning.winners(0) == {}


def test_nothing_is_kept_where_the_driver_is_unknown(card):
    card(driver=None)
    tuning.remember(0, WINNER)
    assert tuning.chosen(*KEY, X) == FAST
    card(driver=None)
    assert tuning.winners(0) == {}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path))
