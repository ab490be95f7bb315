"""What the other ranks of the tests run"""

import os
import signal
import time

import torch

from turbo_nb import backends
from turbo_nb.errors import InputError
from turbo_nb.ops import registry

KERNEL = backends.kernel


def exchange(member):
    """Follow rank 0 through exchanges and failures."""
    member.ready()
    for command, arguments in member.commands():
        globals()[f"_{command}"](member, *arguments)


def _sum(member):
    member.group.sum(torch.ones(1, device=member.device))


def _die(member, number):
    if member.rank == 1:
        os.kill(os.getpid(), number)
    _sum(member)


def _fail(member):
    if member.rank == 1:
        raise InputError("x is 1. Expected 2. Take 2.")
    _sum(member)


def _compiled(member):
    """Be ready later than a rank that hangs"""
    time.sleep(2.5)
    member.say_ready()


def _rest(member, seconds):
    """Reach the exchange later than rank 0"""
    time.sleep(seconds)
    _sum(member)


def _loop(member):
    """Hang with a thread that still shows signs of life"""
    while member.rank == 1:
        time.sleep(0.1)


def _stick(member):
    """Never return from the call that begins an exchange, as NCCL may where a GPU's memory is full"""
    if member.rank == 1:
        member.group._begin(time.sleep, 60)
    _sum(member)


def never_connect(member):
    """Load, and then hang before all ranks are connected"""
    member._send("ready")
    time.sleep(60)


def load_slowly(member):
    time.sleep(60)


def freeze(member):
    """Stop at load with all threads, as where the disk does not answer"""
    os.kill(os.getpid(), signal.SIGSTOP)


def fail_at_load(member):
    if member.rank == 1:
        raise InputError("model is 'x'. Expected a model.")
    time.sleep(60)


def tiny_transformer(heads, attention, device):
    from diffusers import WanTransformer3DModel

    from turbo_nb import sla

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        attention_head_dim=16, num_attention_heads=heads, num_layers=2, ffn_dim=64, text_dim=24, freq_dim=32
    ).requires_grad_(False)
    if attention == "sagesla":
        sla.set_attention_type(model, "sagesla", 0.3, backend="reference")
    else:
        sla.set_attention_type(model, attention, 0.3)
    for block in model.blocks:
        if attention != "original":
            torch.nn.init.normal_(block.attn1.processor.sla.proj_l.weight, std=0.3)
    return model.to(device)


def tiny_vae(device, base_dim=16, **config):
    from diffusers import AutoencoderKLWan

    from turbo_nb.fused import vae as fused_vae

    torch.manual_seed(1)
    vae = (
        AutoencoderKLWan(**{"base_dim": base_dim, "num_res_blocks": 1} | config).requires_grad_(False).eval().to(device)
    )
    fused_vae.fuse(vae)
    return vae


def sla_in_float32(q, k, v, weight, bias, topk, block_q, block_k, sums, to):
    """Compute `triton_sla.sparse_linear_attention` with the map of the reference, because Triton's takes 16 bits"""
    from turbo_nb.ops.attention import reference, triton_sla

    kept = reference.block_map(q, k, topk, block_q, block_k)
    kept = kept.nonzero()[:, -1].int().view(*kept.shape[:-1], -1)
    state, norm = triton_sla.linear_state(k, v, weight)
    return triton_sla.sparse_linear(q, k, v, kept, state, norm, bias, block_q, block_k, to=to)


def exchange_by(peers, how, group):
    """Let steps exchange in messages ("packed"), by copies ("copied"), or by what interpreted kernels write"""

    def interpreted(operation, *tensors, override=None, writes_parts=False):
        if not writes_parts or override is not None:
            return None
        return sla_in_float32 if operation == "sla" else registry.find(operation, "triton").load()

    group.peers = None if how == "packed" else peers
    backends.kernel = interpreted if how == "written" else KERNEL


@torch.inference_mode()
def models(member, heads, attentions):
    """Follow rank 0 through steps of several transformers, decoding and encoding."""
    from shared_memory import SharedMemory

    from turbo_nb.parallel import group, strips, ulysses

    group.Group._memory = lambda self: SharedMemory()

    steps = [tiny_transformer(heads, attention, member.device) for attention in attentions]
    for number, model in enumerate(steps):
        ulysses.split(model, ulysses.Ulysses(member, number))
    vae = tiny_vae(member.device)
    member.ready()
    peers, clips = member.group.peers, {}
    for command, arguments in member.commands():
        if command == "exchange":
            exchange_by(peers, *arguments, member.group)
        elif command == "step":
            number, *told = arguments
            steps[number].ulysses.follow(steps[number], *told)
        elif command == "strips":
            strips.follow(vae, clips, *arguments, member.group)
        else:
            clips[arguments[0]]()
