"""CUDA graphs of steps: the bits of plain steps, whatever changes between them, and the plain step where none fits."""

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers import choose_triton, interpret_kernels
from torch import nn

from turbo_nb import sla
from turbo_nb.fused import transformer as fused_transformer
from turbo_nb.machine import environment
from turbo_nb.runtime import graphs
from turbo_nb.runtime.graphs import StepGraphs
from turbo_nb.runtime.plan import Plan
from turbo_nb.runtime.steps import Tally

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
PLAN = Plan(name="resident", text_encoder="resident", offload="none", vae_tiling=False, budget=80e9, device="cuda")


def tensors(result):
    """Tensors in nested lists"""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for one in result for tensor in tensors(one)] if isinstance(result, list | tuple) else []


class Replayed:
    """Records on a CPU: a replay runs the work again, and writes into the tensors of the first time"""

    def __init__(self, device="cuda", room=80e9, fails=None):
        self.free, self.fails, self.released = room, fails, 0

    def record(self, work):
        if self.fails:
            raise self.fails
        with patch.object(fused_transformer, "is_recorded", lambda x: True):
            result = work()
        for tensor in tensors(result):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)  # recording computes nothing

        def replay():
            with patch.object(fused_transformer, "is_recorded", lambda x: True):
                for old, new in zip(tensors(result), tensors(work()), strict=True):
                    old.copy_(new)

        return replay, result

    def used(self, peak=False):
        return 2e9 if peak else 1e9

    def room(self, wanted):
        return self.free

    def release(self):
        self.released += 1


@pytest.fixture
def fused(monkeypatch):
    """Return a function that makes a fused transformer"""
    if not CUDA:
        choose_triton(monkeypatch)
        # fused blocks run diffusers' own forwards in float32, and only the projection of the prompt is kept
        project = lambda model, text: [model.condition_embedder.text_embedder(text)]  # noqa: E731
        monkeypatch.setattr(fused_transformer, "prepare_prompt", project)

    def make(topk=0.5, seed=0):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=64, ffn_dim=192, num_layers=2, text_dim=32
        )
        transformer = transformer.to(DEVICE, DTYPE).eval().requires_grad_(False)
        sla.set_attention_type(transformer, "sla", topk)
        for block in transformer.blocks:
            nn.init.normal_(block.attn1.processor.sla.proj_l.weight, std=0.1)
        fused_transformer.fuse(transformer, DEVICE if CUDA else None)
        return transformer

    return make


def step_graphs(**more):
    return StepGraphs() if CUDA and not more else StepGraphs(lambda device: Replayed(device, **more))


def inputs(step=0, tokens=5, frames=2):
    """Latents, timestep and prompt of a step"""
    generator = torch.Generator().manual_seed(step)
    text = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(100 + tokens))
    text[:, tokens:] = 0
    latents = torch.randn(1, 16, frames, 6, 8, generator=generator)
    return latents.to(DEVICE, DTYPE), torch.tensor([900.0 - step], device=DEVICE), text.to(DEVICE, DTYPE)


def call(transformer, latents, timestep, text):
    return transformer(
        hidden_states=latents, timestep=timestep, encoder_hidden_states=text, attention_kwargs=None, return_dict=False
    )[0]


@torch.inference_mode()
def clip(own, models, steps=3, *, plan=PLAN, later=0, tokens=5, frames=2, before=None, **more):
    """Run a clip with graphs, and its plain steps; return the tally and whether all bits are equal"""
    tally, same, begun = Tally(), True, []
    text = inputs(0, tokens)[2]
    plain = []
    for model in models:
        for number in range(steps):
            plain.append(call(model, *inputs(number, tokens, frames)[:2], text.clone()))
    with own.replacing(models, plan, tally, later=later, on_begin=lambda: begun.append(1)):
        outs = [call(model, *inputs(number, tokens, frames)[:2], text) for model in models for number in range(steps)]
    same = all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(outs, plain, strict=True))
    assert len(begun) == tally.replayed and not any("forward" in vars(model) for model in models)
    return tally, same


def counts(tally):
    return tally.captured, tally.replayed, tally.reason


def test_graphs_give_the_bits_of_plain_steps(fused):
    own, model = step_graphs(), fused()
    tally, same = clip(own, [model])
    assert counts(tally) == (0, 0, "") and same  # the first clip is plain
    tally, same = clip(own, [model])
    assert counts(tally) == (1, 3, "") and same
    tally, same = clip(own, [model])
    assert counts(tally) == (0, 3, "") and same
    tally, same = clip(own, [model], tokens=11)  # one graph serves every prompt
    assert counts(tally) == (0, 3, "") and same
    tally, same = clip(own, [model], tokens=16)
    assert counts(tally) == (0, 3, "") and same


def test_two_experts_take_turns_and_shapes_alternate(fused):
    own, models = step_graphs(), [fused(), fused(seed=1)]
    for frames in (2, 3):
        assert counts(clip(own, models, frames=frames)[0]) == (0, 0, "")
        tally, same = clip(own, models, frames=frames)
        assert counts(tally) == (2, 6, "") and same
    for frames in (2, 3, 2):
        tally, same = clip(own, models, frames=frames, tokens=3 + frames)
        assert counts(tally) == (0, 6, "") and same
    assert len(own._graphs) == 4
    clip(own, models, frames=1)
    tally, same = clip(own, models, frames=1)  # a fifth and a sixth; the least recently used ones go
    assert counts(tally) == (2, 6, "") and same and len(own._graphs) == graphs.MOST
    tally, same = clip(own, models, frames=2)
    assert same


@torch.inference_mode()
def test_experts_that_alternate_within_a_clip_prepare_the_prompt_again(fused):
    own, models, tally = step_graphs(), [fused(), fused(seed=1)], Tally()
    text = inputs()[2]
    clip(own, models)
    plain = [call(model, *inputs(number)[:2], text.clone()) for number in range(4) for model in models]
    with own.replacing(models, PLAN, tally):
        outs = [call(model, *inputs(number)[:2], text) for number in range(4) for model in models]
    assert tally.replayed == 8 and all(map(torch.equal, outs, plain))


def test_a_change_on_another_rank_drops_the_graph(fused):
    class Ranks:
        grown, other = 0, ""  # other: a reason that another rank has

        def agree(self, reason):
            return reason or self.other

        sharing = staticmethod(lambda *_, **__: nullcontext())
        can_share = staticmethod(lambda *_: True)

    own, model = step_graphs(), fused()
    model.ulysses = ranks = Ranks()
    assert [counts(clip(own, [model])[0])[:2] for _ in range(3)] == [(0, 0), (1, 3), (0, 3)]
    ranks.grown = 1  # addresses that a graph has are outdated
    assert [counts(clip(own, [model])[0])[:2] for _ in range(2)] == [(0, 0), (1, 3)]
    state, ranks.other = own.state(model), "a merge"
    assert own.state(model) != state and not own._graphs
    assert counts(clip(own, [model])[0]) == (0, 0, "a merge")


@torch.inference_mode()
def test_a_step_that_ranks_cannot_share_is_plain_and_other_ranks_do_not_begin_it(fused):
    class Ranks:
        begun, attached = 0, False

        def agree(self, reason):
            return reason

        def can_share(self, *_):
            return not self.attached

        def sharing(self, *_, **__):
            self.begun += 1
            return nullcontext()

    own, model, ranks = step_graphs(), fused(), Ranks()
    model.ulysses = ranks
    for _ in range(2):
        clip(own, [model])
    ranks.begun = 0
    with own.replacing([model], PLAN, tally := Tally()):
        call(model, *inputs())
        ranks.attached = True  # as a LoRA of diffusers between two steps
        call(model, *inputs(1))
    assert ranks.begun == tally.replayed == 1


@pytest.mark.parametrize("here", [True, False], ids=["here", "on another rank"])
def test_memory_that_ran_out_drops_the_graphs_of_all_ranks(fused, here):
    class Ranks:
        answers, asked = [], []

        def agree(self, reason):
            self.asked.append(reason)
            return reason or (self.answers.pop(0) if self.answers else "")

        sharing = staticmethod(lambda *_, **__: nullcontext())
        can_share = staticmethod(lambda *_: True)

    own, models, ranks = step_graphs(fails=None), [fused(), fused(seed=1)], Ranks()
    for model in models:
        model.ulysses = ranks
    clip(own, models)
    assert counts(clip(own, models[:1])[0]) == (1, 3, "")
    ranks.asked.clear()
    if here:
        own._recorder.fails = torch.OutOfMemoryError("full")
    else:
        ranks.answers = ["", "", "", "another GPU cannot", "another GPU cannot"]
    reason = "memory ran out" if here else "another GPU cannot"
    assert counts(clip(own, models[1:], steps=1)[0]) == (0, 0, reason)
    assert ranks.asked == ["", "", "", *["memory ran out" if here else ""] * 2]
    assert counts(clip(own, models[:1])[0]) == (0, 0, "memory ran out")


@pytest.mark.parametrize("change", ["values", "topk", "addresses", "module", "variable"])
def test_what_changes_between_clips_changes_the_graph(fused, change, monkeypatch):
    own, model = step_graphs(), fused()
    clip(own, [model])
    assert counts(clip(own, [model])[0]) == (1, 3, "")
    again = True
    if change == "values":  # as a LoRA is merged
        again = False
        with torch.no_grad():
            model.blocks[1].ffn.net[2].weight.mul_(1.5)
            model.blocks[0].attn2.to_k.weight.mul_(1.5)
    elif change == "topk":
        sla.set_topk(model, 1.0)
    elif change == "addresses":
        model.blocks[0].ffn.net[2].weight = nn.Parameter(2 * model.blocks[0].ffn.net[2].weight, requires_grad=False)
    elif change == "module":
        model.blocks[0].ffn.net[2] = type("Scaled", (nn.Linear,), {"forward": lambda self, x: 2 * super(
            type(self), self).forward(x)})(192, 128, device=DEVICE, dtype=DTYPE).requires_grad_(False)  # fmt: skip
    else:
        monkeypatch.setenv("TURBO_NB_LINEAR", "reference")
    if again:
        tally, same = clip(own, [model])
        assert counts(tally) == (0, 0, "") and same and not own._graphs
    tally, same = clip(own, [model])
    assert counts(tally) == (int(again), 3, "") and same


def test_where_no_graph_fits_the_plain_step_runs_and_the_reason_is_data(fused, monkeypatch):
    own, model = step_graphs(), fused()
    for _ in range(2):
        clip(own, [model])
    assert own._graphs
    for change, reason in [
        ({"offload": "group"}, "plan resident moves weights"),
        ({"device": "cpu"}, "runs on the CPU"),
    ]:
        tally, same = clip(own, [model], plan=replace(PLAN, **change))
        assert counts(tally) == (0, 0, reason) and same and not own._graphs
    for owner in (model, model.blocks[1].attn1.to_q):
        calls = []
        hook = owner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tally, _ = clip(own, [model])
        hook.remove()
        assert tally.reason.startswith("a hook on") and tally.replayed == 0 and calls
    monkeypatch.setenv(environment.GRAPHS, "0")
    assert counts(clip(own, [model])[0]) == (0, 0, "TURBO_NB_GRAPHS=0")
    monkeypatch.delenv(environment.GRAPHS)
    fused_transformer.unfuse(model)
    assert clip(own, [model])[0].reason == "not all blocks run in fused kernels"


@torch.inference_mode()
def test_calls_that_a_graph_cannot_make_are_plain(fused):
    own, model, tally = step_graphs(), fused(), Tally()
    for _ in range(2):
        clip(own, [model])
    latents, timestep, text = inputs()
    with own.replacing([model], PLAN, tally):
        out = model(latents, timestep, text)
        assert out.sample.isfinite().all() and tally.reason == "arguments that a graph does not take"
        with torch.autocast(DEVICE, torch.bfloat16):
            assert call(model, *inputs()).isfinite().all()
    assert tally.replayed == 0 and tally.reason == "gradients or autocast"


def test_memory_that_later_stages_need_is_not_taken(fused):
    own, model = step_graphs(room=5e9), fused()  # a plain step takes 1 GB, a graph of it 1.1
    clip(own, [model], later=4e9)
    tally, same = clip(own, [model], later=4e9)
    assert counts(tally) == (0, 0, "a graph takes 1.1 GB, later stages 4.0, and 5.0 are free") and same
    own, model, small = step_graphs(), fused(), replace(PLAN, budget=4e9)
    clip(own, [model], plan=small, later=4e9)
    assert "are free" in clip(own, [model], plan=small, later=4e9)[0].reason


@pytest.mark.parametrize(
    "error, reason",
    [
        (torch.OutOfMemoryError("full"), "memory ran out"),
        (RuntimeError("bad launch\nmore"), "not recorded: bad launch"),
    ],
)
def test_a_recording_that_fails_leaves_plain_steps(fused, error, reason):
    own, model = step_graphs(fails=error), fused()
    clip(own, [model])
    for _ in range(2):
        tally, same = clip(own, [model])
        assert counts(tally) == (0, 0, reason) and same


def test_dropping_graphs_returns_their_memory_once(fused):
    own, model = step_graphs(), fused()
    assert not own.release()
    for _ in range(2):
        clip(own, [model])
    assert own.release() and not own.release()
    assert counts(clip(own, [model])[0]) == (1, 3, "")  # its shape ran before
    assert own.out_of_memory()
    assert counts(clip(own, [model])[0]) == (0, 0, "memory ran out")


@torch.inference_mode()
def test_a_run_that_is_cancelled_leaves_a_usable_graph(fused):
    own, model = step_graphs(), fused()
    for _ in range(2):
        clip(own, [model])
    with pytest.raises(KeyboardInterrupt), own.replacing([model], PLAN, Tally()):
        call(model, *inputs())
        raise KeyboardInterrupt
    tally, same = clip(own, [model])
    assert counts(tally) == (0, 3, "") and same


@pytest.mark.skipif(CUDA, reason="the tests above run the kernels on a GPU")
def test_a_prepared_prompt_needs_no_wait_and_gives_the_same_bits(monkeypatch):
    choose_triton(monkeypatch)
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=64, ffn_dim=64, num_layers=1, text_dim=32, in_channels=4
    )
    model = model.half().eval().requires_grad_(False)
    fused_transformer.fuse(model)
    interpret_kernels(monkeypatch)
    latents, timestep, text = torch.randn(1, 4, 1, 4, 4).half(), torch.tensor([900.0]), inputs()[2].half()
    with torch.no_grad():
        expected = call(model, latents, timestep, text)
        fused_transformer.forget_prompt(model)
        monkeypatch.setattr(fused_transformer, "is_recorded", lambda x: True)
        projected, keys, values, counts = fused_transformer.prepare_prompt(model, text)
        assert projected.shape[1] == keys.shape[1] == values.shape[1] == 16 and counts[0] == 6
        assert torch.equal(call(model, latents, timestep, text), expected)
