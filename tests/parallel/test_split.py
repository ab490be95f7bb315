"""A step and the VAE on 3 ranks: the results of one, at any length and height. test_pipeline.py has 2 ranks."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise, product
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import pytest
import targets
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanEncoder3d
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from helpers import assert_close
from shared_memory import SharedMemory
from torch import distributed as dist

from turbo_nb import backends, sla
from turbo_nb.fused import vae as fused_vae
from turbo_nb.ops import launch
from turbo_nb.parallel import group, peers, ranks, strips, ulysses
from turbo_nb.parallel.group import shares

HEADS = 6  # 2 for each of 3 ranks, which exchange one while they compute the other
ATTENTIONS = ("sla", "sagesla", "original")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not find_spec("triton"), reason="the interpreter of Triton is off"
)
CPU = "cpu"  # also on a GPU machine, because float32 tells more of the exchanges


def device_of(rank):
    return CPU


@pytest.fixture(scope="module")
def team():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group.Group, "_memory", lambda self: SharedMemory())
        team = ranks.start(3, device_of, targets.models, HEADS, ATTENTIONS)
        yield team
        team.close()


@pytest.fixture(params=["packed", "copied", pytest.param("written", marks=interpreted)])
def exchanged(request, loaded, team):
    """Steps exchange in messages, or through memory that the ranks share"""

    def use(how, peers=team.group.peers):
        team.tell("exchange", how)
        targets.exchange_by(peers, how, team.group)

    use(request.param)
    yield
    use("copied")


@pytest.fixture(scope="module")
def loaded(team):
    """Models of rank 0 that are split, and the same models on one rank"""
    split = [targets.tiny_transformer(HEADS, attention, CPU) for attention in ATTENTIONS]
    whole = [targets.tiny_transformer(HEADS, attention, CPU) for attention in ATTENTIONS]
    for number, model in enumerate(split):
        ulysses.split(model, ulysses.Ulysses(team, number))
    vae = targets.tiny_vae(CPU)
    vae.strips = strips.Strips(team)
    team.join()
    return dict(zip(ATTENTIONS, zip(split, whole, strict=True), strict=True)), (vae, targets.tiny_vae(CPU))


def step(model, size, batch=1, seed=0):
    torch.manual_seed(seed)
    text = torch.randn(batch, 7, 24)
    with torch.inference_mode():
        return model(torch.randn(batch, 16, *size), torch.full((batch,), 900.0), text, return_dict=False)[0]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("size", [(1, 14, 14), (3, 18, 14), (2, 20, 28)], ids=["49", "189", "280"])
def test_a_step_is_that_of_one_rank(loaded, team, exchanged, attention, size):
    split, whole = loaded[0][attention]
    before = team.group.exchanges
    assert_close(f"{attention} {size}", step(whole, size), step(split, size), 1e-5)
    assert team.group.exchanges - before >= 2 + 2 * len(split.blocks)  # each block exchanged twice


def test_a_step_of_two_clips_and_one_of_too_few_tokens(loaded, team, exchanged):
    split, whole = loaded[0]["sla"]
    assert_close("two clips", step(whole, (2, 12, 12), 2), step(split, (2, 12, 12), 2), 1e-5)
    before = team.group.exchanges
    assert_close("few tokens", step(whole, (1, 4, 4)), step(split, (1, 4, 4)), 1e-6)
    assert team.group.exchanges == before


def test_other_ranks_take_over_another_attention_and_topk(loaded):
    split, whole = loaded[0]["sla"]
    for attention, topk in (("sla", 0.9), ("original", 0.1), ("sla", 0.3)):
        kept = [block.attn1.processor for block in whole.blocks]
        for model in (split, whole):
            sla.set_attention_type(model, attention, topk)
        if attention == "sla" and not isinstance(kept[0], sla.SLAProcessor):  # proj_l was dropped, and starts at zero
            assert all(not block.attn1.processor.sla.proj_l.weight.any() for block in split.blocks)
        assert_close(f"{attention} {topk}", step(whole, (2, 16, 18)), step(split, (2, 16, 18)), 1e-5)


def test_other_ranks_take_over_a_topk_and_keep_the_backend(loaded):
    split, whole = loaded[0]["sagesla"]
    for model in (split, whole):
        sla.set_topk(model, 0.9)
    assert_close("sagesla 0.9", step(whole, (2, 16, 18)), step(split, (2, 16, 18)), 1e-5)


def test_other_ranks_take_over_the_sizes_of_blocks(loaded):
    split, whole = loaded[0]["sla"]
    sizes = []
    for block_q, block_k in ((32, 16), (sla.BLOCK_Q, sla.BLOCK_K)):
        for block in (*split.blocks, *whole.blocks):
            block.attn1.processor.sla.block_q, block.attn1.processor.sla.block_k = block_q, block_k
        sizes.append(step(whole, (2, 16, 18)))
        assert_close(f"{block_q} {block_k}", sizes[-1], step(split, (2, 16, 18)), 1e-5)
    assert not torch.allclose(*sizes)


@pytest.mark.parametrize("attention", ["sla", "original"])
def test_a_step_in_autocast_is_that_of_one_rank(loaded, team, exchanged, attention):
    split, whole = loaded[0][attention]
    before = team.group.exchanges
    with torch.autocast(CPU, torch.float16):
        assert_close(attention, step(whole, (1, 14, 14)), step(split, (1, 14, 14)), 1e-2)
    assert team.group.exchanges > before


def test_other_ranks_take_over_the_variables(monkeypatch):
    link = SimpleNamespace(group=SimpleNamespace(device=torch.device(CPU), broadcast=lambda x: x), tell=Mock())
    model = targets.tiny_transformer(HEADS, "sla", CPU)
    monkeypatch.setenv("TURBO_NB_BLOCK", "reference")
    monkeypatch.delenv("TURBO_NB_ATTENTION", raising=False)
    ulysses.Ulysses(link, 0).tell(model, (torch.zeros(1), torch.zeros(1), torch.zeros(1)), False)
    _, _, *told = link.tell.call_args.args
    monkeypatch.delenv("TURBO_NB_BLOCK")  # as on a rank that began before
    monkeypatch.setenv("TURBO_NB_ATTENTION", "reference")
    seen = []
    model.forward = lambda *_, **__: seen.append(backends.variables())
    ulysses.Ulysses(link, 0).follow(model, *told)
    assert seen[0]["TURBO_NB_BLOCK"] == "reference" and seen[0]["TURBO_NB_ATTENTION"] is None


def test_what_only_rank_0_has_is_computed_by_rank_0(loaded, team):
    split, whole = loaded[0]["original"]
    before, processors = team.group.exchanges, [block.attn1.processor for block in split.blocks]

    class Own(WanAttnProcessor):
        pass

    split.blocks[1].attn1.set_processor(Own())
    assert_close("an attention of its own", step(whole, (1, 14, 14)), step(split, (1, 14, 14)), 1e-6)
    split.blocks[1].attn1.set_processor(processors[1])
    split.peft_config = {"lora": None}
    assert_close("a LoRA of its own", step(whole, (1, 14, 14)), step(split, (1, 14, 14)), 1e-6)
    del split.peft_config
    assert team.group.exchanges == before


def test_layers_with_attentions_of_their_own_are_computed_by_rank_0(loaded, team, monkeypatch):
    split, whole = loaded[0]["sla"]
    before = team.group.exchanges
    for model in (split, whole):
        monkeypatch.setattr(model.blocks[1].attn1.processor.sla, "topk", 0.9)
    assert_close("a topk of its own", step(whole, (2, 16, 18)), step(split, (2, 16, 18)), 1e-6)
    assert team.group.exchanges == before


@pytest.mark.parametrize("attention", ["sla", "original"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_split_transformer_is_computed_by_rank_0(loaded, team, attention, copied):
    split, whole = loaded[0][attention]
    before, own = team.group.exchanges, copied(split)
    assert_close(attention, step(whole, (1, 14, 14)), step(own, (1, 14, 14)), 1e-6)
    assert team.group.exchanges == before


def pictures(*size):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@torch.inference_mode()
def encoded(vae, clip):
    return vae.encode(clip, return_dict=False)[0].parameters


@pytest.mark.parametrize("size", [(1, 3, 2), (3, 7, 4), (6, 4, 3), (2, 11, 5)], ids=str)
def test_strips_decode_to_the_pictures_of_one_rank(loaded, team, size):
    torch.manual_seed(0)
    vae, alone = loaded[1]
    z, before = torch.randn(1, 16, *size), team.group.exchanges
    with torch.inference_mode():
        ref = torch.cat(list(fused_vae.chunks(alone, z)), 2)
        for length in (None, 1, 2):
            assert_close(f"{size}, {length}", ref, torch.cat(list(fused_vae.chunks(vae, z, length)), 2), 1e-5)
    assert team.group.exchanges > before + 30


@pytest.mark.parametrize("size", [(1, 24, 16), (9, 56, 32), (23, 32, 24), (5, 88, 40)], ids=str)
def test_strips_encode_to_the_latents_of_one_rank(loaded, team, monkeypatch, size):
    vae, alone = loaded[1]
    clip, before = pictures(*size), team.group.exchanges
    ref = encoded(alone, clip)
    for length in (4, 1, 2):
        monkeypatch.setattr(fused_vae, "chunk_length", lambda *_, length=length: length)
        assert_close(f"{size}, {length}", ref, encoded(vae, clip), 1e-5)
    assert team.group.exchanges > before + 30


def convolve_in_order(x, weight, bias, stride=1, *_):
    """Convolve with one order of the sums for each pixel; that of a CPU's kernels depends on the picture's size"""
    stride, dims = torch.as_tensor(stride).expand(x.ndim - 2).tolist(), x.ndim - 2
    sizes = [(side - taps) // step + 1 for side, taps, step in zip(x.shape[2:], weight.shape[2:], stride, strict=True)]
    out = bias.view(-1, *[1] * dims).repeat(len(x), 1, *sizes)
    for tap in product(*map(range, weight.shape[2:])):
        spans = [slice(at, at + size * step, step) for at, size, step in zip(tap, sizes, stride, strict=True)]
        of_channels = weight[:, :, *tap].t()[:, None].unflatten(2, (-1, *[1] * dims))
        for term in x[:, :, *spans].transpose(0, 1).unsqueeze(2) * of_channels:  # (C, B, out, …)
            out += term
    return out


def on_ranks(size, work):
    """Run work(group) on so many ranks, which are threads of this process, and return rank 0's result"""
    store = dist.HashStore()

    @torch.inference_mode()
    def run(rank):
        own = group.Group(store, rank, size, CPU)
        own.connect()
        return work(own)

    with ThreadPoolExecutor(size) as threads:
        return next(threads.map(run, range(size)))


@pytest.mark.parametrize("why", ["few rows", "height", "tiling", "another encoder"])
def test_rank_0_works_alone_where_the_ranks_cannot_share_the_rows(loaded, team, monkeypatch, why):
    vae, alone = loaded[1]
    height = {"few rows": 16, "height": 60}.get(why, 48)
    z, clip, before = torch.randn(1, 16, 1, height // 8, 3), pictures(5, height, 24), team.group.exchanges
    if why == "tiling":
        monkeypatch.setattr(vae, "use_tiling", True)
    if why == "another encoder":
        monkeypatch.setattr(vae.encoder, "__class__", WanEncoder3d)
    assert_close(why, encoded(alone, clip), encoded(vae, clip), 1e-5)
    assert team.group.exchanges == before
    with torch.inference_mode():
        out, ref = (torch.cat(list(fused_vae.chunks(one, z)), 2) for one in (vae, alone))
    assert_close(why, ref, out, 1e-5)
    assert (team.group.exchanges == before) == (why in ("few rows", "tiling"))


@pytest.mark.parametrize("why", ["grad mode", "autocast"])
@pytest.mark.parametrize("name", ["decode", "encode"])
def test_rank_0_works_alone_in_grad_mode_and_in_autocast(loaded, team, name, why):
    def coded(vae):
        with torch.set_grad_enabled(why != "autocast"), torch.autocast(CPU, torch.bfloat16, enabled=why == "autocast"):
            out = getattr(vae, name)(x, return_dict=False)[0]
        return (out if name == "decode" else out.parameters).float()

    x = pictures(5, 32, 24) if name == "encode" else torch.randn(1, 16, 1, 4, 3)
    (vae, alone), before = loaded[1], team.group.exchanges
    assert_close(why, coded(alone), coded(vae), 1e-5)
    assert team.group.exchanges == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_pictures_of_another_dtype_are_an_error_and_the_ranks_stay(loaded, team, dtype):
    vae = loaded[1][0]
    with pytest.raises(RuntimeError, match="should be the same"):
        encoded(vae, pictures(5, 32, 24).to(dtype))
    team.check()


def test_a_clip_goes_on_after_others_were_coded_between_its_chunks(loaded, team):
    def coded(vae):
        out, others = [], fused_vae.chunks(vae, z + 1, 2)
        with torch.inference_mode():
            for frames in fused_vae.chunks(vae, z, 1):
                out += [frames, next(others, frames), encoded(vae, clip)]
        return out

    torch.manual_seed(0)
    z, clip, (vae, alone) = torch.randn(1, 16, 3, 4, 3), pictures(1, 32, 24), loaded[1]
    for ref, frames in zip(coded(alone), coded(vae), strict=True):
        assert_close("frames", ref, frames, 1e-5)
    assert not team.clips


def test_two_threads_decode_at_the_same_time(loaded):
    torch.manual_seed(0)
    z, (vae, alone) = torch.randn(1, 16, 3, 4, 3), loaded[1]

    @torch.inference_mode()
    def decoded(one):
        return torch.cat(list(fused_vae.chunks(one, z, 1)), 2)

    with ThreadPoolExecutor(2) as threads:
        for out in threads.map(decoded, [vae] * 6):
            assert_close("frames", decoded(alone), out, 1e-5)


PATCHED = {  # as Wan2.2's 5B and nano's
    "dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "is_residual": True, "in_channels": 12,
    "out_channels": 12, "patch_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("config", "name"), [({}, "decoder"), ({}, "encoder"), (PATCHED, "decoder")], ids=["decode", "encode", "residual"]
)
def test_strips_of_chunks_of_any_length_have_the_bits_of_one_rank(monkeypatch, size, config, name):
    silu = torch.nn.functional.silu  # whose float32 result depends on where an element lies in memory
    for function, ordered in (
        ("conv3d", convolve_in_order), ("conv2d", convolve_in_order), ("silu", lambda x: silu(x.double()).float()),
    ):  # fmt: skip
        monkeypatch.setattr(torch.nn.functional, function, ordered)
    assert all(map(torch.equal, *coded_by(size, config, name)))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_strips_encode_as_one_rank_where_a_shortcut_takes_means(size):
    for parts in zip(*coded_by(size, PATCHED, "encoder"), strict=True):
        assert_close("residual", *parts, 1e-5)


def coded_by(size, config, name):
    """What one rank, and so many ranks, make in chunks of other lengths, for each of two lengths"""
    vae = targets.tiny_vae(CPU, base_dim=4, **config)
    shape = (16, 3, 7, 1) if name == "decoder" else (3, 9, 56, 8)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ref = torch.cat(list(fused_vae.coded(vae, name, x, 2)), 2)
    out = [on_ranks(size, lambda own, n=n: [*strips.strip_parts(vae, name, x, n, own)]) for n in (1, 2)]
    return [ref] * 2, [torch.cat(parts, 2) for parts in out]


@pytest.mark.parametrize("total", [17, 49, 1000, 32_760, 75_600])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_shares_are_even_and_at_multiples(total, size):
    bounds = shares(total, size, 16)
    counts = [end - begin for begin, end in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(counts)) == (0, total, size)
    assert all(bound % 16 == 0 for bound in bounds[:-1]) and max(counts) - min(counts) < 32


class Refusing(SharedMemory):
    """Memory of a rank that cannot share it, or that does not answer"""

    def __init__(self, fault, until):
        super().__init__()
        self.fault, self.until = fault, until

    def allocate(self, nbytes):
        if self.fault == "refuses":
            raise AttributeError("an old driver")
        self.until.wait()
        raise RuntimeError("late")


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
def test_a_rank_that_cannot_share_memory_keeps_no_other_one_waiting(monkeypatch, fault):
    store, until, made, begin = dist.HashStore(), threading.Event(), {}, time.monotonic()
    monkeypatch.setattr(
        group.Group, "_memory", lambda self: Refusing(fault, until) if self.rank == 1 else SharedMemory()
    )

    def connect(rank):
        made[rank] = group.Group(store, rank, 2, CPU)
        with suppress(RuntimeError):
            made[rank].connect()

    other = threading.Thread(target=connect, args=(1,), daemon=True)
    other.start()
    if fault == "hangs":
        threading.Timer(1, lambda: made[0].abort()).start()  # as when rank 1 is found to have ended
    connect(0)
    seconds = time.monotonic() - begin
    until.set()
    assert seconds < 10  # and not 25
    if fault == "refuses":
        other.join(10)
        assert made[0].peers is None is made[1].peers


def test_no_flag_is_left_by_a_pass_that_only_compiles():
    class Launching(SharedMemory):  # a launch waits, as on a GPU
        def wait(self, flags):
            launch.launch(Mock(), (1,), flags) if launch.only_compiles() else super().wait(flags)

    store = dist.HashStore()
    both = [peers.Peers(store, rank, 2, Launching()) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(peers.Peers.works, both))
    with launch.compiling_only():
        for own in both:  # one after the other, so that a rank has waited before the other one sends
            own.deliver(0)
    assert not any(own._flags.own.any() for own in both)
    with ThreadPoolExecutor(2) as threads:
        assert [*threads.map(lambda own: own.deliver(0), both)] == [None, None]


def test_memory_is_given_back_where_another_rank_has_ended():
    class Counted(SharedMemory):
        held: ClassVar = set()

        def allocate(self, nbytes):
            address, own = super().allocate(nbytes)
            self.held.add(address)
            return address, own

        def free(self, address, own):
            if not own:
                raise RuntimeError("the process has ended")
            super().free(address, own)
            self.held.remove(address)

    memory = Counted()
    own = peers.Peers(dist.HashStore(), 0, 1, memory)
    assert own.works()
    own.window("q", 8).addresses[1] = 0
    own.size, own.given_up = 2, True
    for name in ("q", "new"):  # one grows, and one is made
        with pytest.raises(RuntimeError, match="another rank did not come"):
            own.window(name, 16)
    assert len(memory.held) == 5
    del own
    assert not memory.held


def test_a_rank_stops_waiting_for_one_that_has_ended():
    own = peers.Peers(dist.HashStore(), 0, 1, SharedMemory())
    assert own.works()
    own.size = 2  # and rank 1 does not come
    threading.Timer(0.1, own.give_up).start()
    with pytest.raises(RuntimeError, match="another rank did not come"):
        own.window("more", 8)
