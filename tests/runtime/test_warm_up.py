"""Kernels are compiled at the same time, before the first step, and are those that a clip launches."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from turbo_nb.ops import launch, tuning
from turbo_nb.runtime import warm_up


class Kernel:
    """Notes its launches and its compilations"""

    __name__ = "kernel"

    def __init__(self):
        self.launched, self.compiled = [], []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((grid, options))

    def warmup(self, *arguments, grid, **options):
        self.compiled.append((grid, options))


def test_launches_only_compile_inside_the_context_and_in_its_thread():
    kernel, indices, x = Kernel(), torch.full((4,), 9, dtype=torch.int32), torch.ones(4)
    with launch.compiling_only():
        launch.launch(kernel, (2, 3), x, indices, 5, BLOCK=64, num_warps=4)
        other = threading.Thread(target=lambda: launch.launch(kernel, (1,), x))
        other.start()
        other.join()
    assert kernel.compiled == [((2, 3), {"BLOCK": 64, "num_warps": 4})] and kernel.launched == [((1,), {})]
    assert not indices.any() and x.all()  # torch may use integers as indices
    launch.launch(kernel, (1,), x)
    assert len(kernel.launched) == 2


def test_an_error_ends_the_context():
    with pytest.raises(ValueError, match="x"), launch.compiling_only():
        raise ValueError("x")
    kernel = Kernel()
    launch.launch(kernel, (1,), torch.ones(1))
    assert kernel.launched


@pytest.mark.parametrize(("frames", "chunks"), [(1, [1]), (9, [1, 2]), (17, [1, 4]), (25, [1, 4, 2]), (81, [1, 4])])
def test_the_vae_decodes_and_encodes_a_chunk_of_every_length(monkeypatch, frames, chunks):
    decoded = []

    def chunked(vae, z):
        assert z.shape == (1, 16, sum(chunks), 60, 104)
        decoded.append(z.shape)
        yield z

    monkeypatch.setattr(warm_up.fused_vae, "chunks", chunked)
    vae = SimpleNamespace(config=SimpleNamespace(z_dim=16), device="cpu", dtype=torch.float32)
    warm_up._code(vae, (1 + (frames - 1) // 4, 60, 104), encodes=False)
    vae.encode = lambda x: decoded.append(x.shape)
    warm_up._code(vae, (1 + (frames - 1) // 4, 60, 104), encodes=True)
    assert decoded[2:] == [(1, 3, 4 * sum(chunks) - 3, 480, 832)]


def test_progress_counts_the_kernels_once_they_take_long(monkeypatch):
    class Compiled:
        @property
        def run(self):
            loaded.append(self)

    class Mode:
        def __init__(self, executor, ignore_errors):
            assert ignore_errors
            self.raw_futures = [executor.submit(Compiled) for _ in range(3)]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    seen, inside, loaded = [], [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(warm_up, "_async_mode", lambda: Mode)
    monkeypatch.setattr(warm_up, "_code", lambda *_: inside.append(launch._compiling_only.get()))
    monkeypatch.setattr(warm_up.fused_transformer, "warm_up", lambda *_, **more: None)
    warm_up.vae(None, (832, 480, 81))
    assert inside == [True] and len(loaded) == 3
    warm_up.transformer(None, (832, 480, 81), lambda *counted: seen.append(counted))
    assert seen == [] and len(loaded) == 6
    monkeypatch.setattr(warm_up, "QUIET", -1.0)
    warm_up.transformer(None, (832, 480, 81), lambda *counted: seen.append(counted))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_an_older_triton_compiles_one_after_the_other(monkeypatch):
    ran = []
    monkeypatch.setattr(warm_up, "_async_mode", lambda: None)
    monkeypatch.setattr(warm_up.fused_transformer, "warm_up", lambda transformer, size: ran.append(size))
    monkeypatch.setattr(warm_up, "_code", lambda *_: pytest.fail("the VAE compiles with its first clip"))
    warm_up.transformer(None, (832, 480, 81))
    warm_up.vae(None, (832, 480, 81))
    assert ran == [(21, 60, 104)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_clip_compiles_nothing_after_the_warm_up(monkeypatch, tmp_path):
    import turbo_nb
    from turbo_nb.runtime.compilations import compilations

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pipeline = turbo_nb.load_pipeline("nano", device="cuda", text_cache=False)
    with compilations("cuda") as names:
        turbo_nb.generate(pipeline, "a large red circle")
    assert names == []


@pytest.mark.parametrize(("wanted", "found"), [(True, {"a kernel": 1}), (True, {}), (False, {})])
def test_launches_are_timed_once_and_the_fastest_compiled(monkeypatch, wanted, found):
    """A kernel's other variants are compiled in its fastest launch, too"""
    calls = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(warm_up, "_async_mode", lambda: object)
    monkeypatch.setattr(warm_up.tune, "wanted", lambda gpu: wanted)
    monkeypatch.setattr(warm_up.tune, "tune", lambda gpu, work, compiling: (calls.append("tune"), found)[1])
    monkeypatch.setattr(warm_up, "transformer", lambda *_: calls.append("transformer"))
    monkeypatch.setattr(warm_up, "vae", lambda *_: calls.append("vae"))
    warm_up.choose_launches(SimpleNamespace(transformer=None, vae=None), (832, 480, 81))
    assert calls == ["tune"] * wanted + ["transformer", "vae"] * bool(found)


@pytest.mark.parametrize(("length", "tried"), [(1, [1]), (21, [2])])
def test_the_sample_of_a_clip_is_the_latent_frame_after_the_first(monkeypatch, length, tried):
    seen = []

    def chunked(vae, z, chunk):
        assert chunk == 1 and z.shape == (1, 16, min(2, length), 60, 104) and z.std() > 0.9
        for number in range(1, z.shape[2] + 1):
            if tuning._trial.get():
                seen.append(number)
            yield z

    monkeypatch.setattr(warm_up.fused_vae, "chunks", chunked)
    monkeypatch.setattr(warm_up.fused_transformer, "warm_up", lambda *_, **more: None)
    vae = SimpleNamespace(config=SimpleNamespace(z_dim=16), device=torch.device("cpu"), dtype=torch.float32)
    with tuning.trying(lambda *_: None):
        warm_up._sample(SimpleNamespace(transformer=None, vae=vae), (length, 60, 104))
    assert seen == tried
