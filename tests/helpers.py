"""What several tests use."""

import contextlib
import io
import os
import subprocess
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from turbo_nb import backends, cli
from turbo_nb.linear import Int8Linear, frozen, int8_quantize
from turbo_nb.machine import probe
from turbo_nb.machine.probe import Library, Machine
from turbo_nb.ops.compare import relative_error

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    """Upstream's own outputs: tests/golden/<name>.safetensors"""
    return load_file(GOLDEN / f"{name}.safetensors")


def home_or(folder: Path) -> dict[str, str]:
    """The variable that makes `folder` the home of a tool which needs one; none where the user has a home"""
    return {} if os.access(os.path.expanduser("~"), os.W_OK) else {"HOME": str(folder)}


def assert_close(name: str, ref: torch.Tensor, out: torch.Tensor, bound: float) -> None:
    assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    assert out.isfinite().all(), f"{name}: not finite"
    error = relative_error(out, ref)
    assert error <= bound, f"{name}: rel. L2 {error:.3g} > {bound:.3g}"


def choose_triton(monkeypatch) -> None:
    """Make this a machine whose every device, the CPU too, is a GPU of sm_80 with Triton."""
    monkeypatch.setattr(Machine, "on", lambda self, device: self)
    set_machine(
        monkeypatch, Machine(gpu="A100", gpu_count=1, arch=(8, 0), libraries={"triton": Library(version="3.9")})
    )


def set_machine(monkeypatch, machine: Machine) -> None:
    monkeypatch.setattr(probe, "this_machine", lambda: machine)


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says that it is on GPU `index`: `x.as_subclass(OnGpu)`."""

    is_cuda = True
    index = 0

    def get_device(self):
        return self.index


def interpret_kernels(monkeypatch) -> None:
    """Let the chosen kernels take tensors of the CPU, where Triton interprets them (tests/conftest.py)."""
    if torch.cuda.is_available():
        pytest.skip("tests/ops runs the kernels on the GPU")
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_half_on_gpu", lambda tensors: True)


def write_upstream(path: Path, more: dict | None = None, drop: list[str] = (), state: str = "dit_state") -> Path:
    """A golden checkpoint as upstream's .pth, with some tensors more or fewer"""
    tensors = golden(state) | (more or {})
    torch.save({key: tensor for key, tensor in tensors.items() if key not in drop}, path)
    return path


def upstream_names(arch, *, sla: bool, int8: bool, text_dim: int = 4096, device="cpu") -> dict[str, torch.Tensor]:
    """A random state dict of a whole model with upstream's names, float32 but for int8 weights"""
    dim, ffn, head_dim = arch.dim, arch.ffn_dim, arch.dim // arch.num_heads
    state = {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, device=device) * 0.02

    def linear(name: str, rows: int, columns: int, quantised: bool = False) -> None:
        if quantised:
            state[f"{name}.int8_weight"] = torch.zeros(rows, columns, dtype=torch.int8, device=device)
            add(f"{name}.scale", -(-rows // 128), -(-columns // 128))
        else:
            add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows)

    linear("patch_embedding", dim, arch.in_channels * 4)
    linear("text_embedding.0", dim, text_dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, 256)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    linear("head.head", 64, dim)
    add("head.modulation", 1, 2, dim)
    for index in range(arch.num_layers):
        block = f"blocks.{index}"
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"{block}.{attention}.{name}", dim, dim, int8)
            add(f"{block}.{attention}.norm_q.weight", dim)
            add(f"{block}.{attention}.norm_k.weight", dim)
        linear(f"{block}.ffn.0", ffn, dim, int8)
        linear(f"{block}.ffn.2", dim, ffn, int8)
        add(f"{block}.norm3.weight", dim)
        add(f"{block}.norm3.bias", dim)
        add(f"{block}.modulation", 1, 6, dim)
        if sla:
            linear(f"{block}.self_attn.attn_op.local_attn.proj_l", head_dim, head_dim)
    return state


def tiny_transformer(arch, *, text_dim: int, sla: bool = True, int8: bool = False):
    """diffusers' transformer of this shape"""
    from diffusers import WanTransformer3DModel

    from turbo_nb.linear import empty_linears
    from turbo_nb.sla import set_attention_type

    model = WanTransformer3DModel(
        attention_head_dim=arch.dim // arch.num_heads,
        num_attention_heads=arch.num_heads,
        num_layers=arch.num_layers,
        ffn_dim=arch.ffn_dim,
        in_channels=arch.in_channels,
        out_channels=16,
        text_dim=text_dim,
    )
    if sla:
        set_attention_type(model, "sla")
    if int8:
        empty_linears(model, True, torch.bfloat16)
    return model


UPSTREAM_PARTS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1.processor.sla.proj_l": "self_attn.attn_op.local_attn.proj_l",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    ".norm2.": ".norm3.",
    "proj_out": "head.head",
}


def to_upstream(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A diffusers transformer's state dict under upstream's names"""
    renamed = {}
    for key, tensor in state.items():
        for ours, theirs in UPSTREAM_PARTS.items():
            key = key.replace(ours, theirs)
        key = key.replace("scale_shift_table", "modulation" if key.startswith("blocks") else "head.modulation")
        renamed[key] = tensor.flatten(1) if key == "patch_embedding.weight" else tensor
    return renamed


def int8_of(linear: nn.Linear) -> Int8Linear:
    """Return the 8-bit form of a linear, with tile scales"""
    out = Int8Linear(linear.in_features, linear.out_features, linear.bias is not None, "meta")
    out.int8_weight, out.scale = map(frozen, int8_quantize(linear.weight.detach()))
    out.bias = None if linear.bias is None else frozen(linear.bias.detach())
    return out


def command_line(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    """turbo-nb in this process, which has loaded torch already; what a shell sees of it"""
    line, out, errors, code = ["turbo-nb", *map(str, arguments)], io.StringIO(), io.StringIO(), 0
    with (
        mock.patch("sys.argv", line),
        mock.patch.dict(os.environ),
        contextlib.chdir(cwd),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(line, code, out.getvalue(), errors.getvalue())
