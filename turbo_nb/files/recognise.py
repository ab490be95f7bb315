"""Weight files: read safely, and told apart by their tensors alone.

`read(path)` never runs code from a file: pickles load with `weights_only`, and what is no honest file of tensors is
refused before anything is allocated. The tensors are mapped from the file, not copied.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from .. import catalog
from ..errors import CheckpointError, first_line
from .names import PROJ_L, _umt5_names, _without_prefix

PATCH = 1 * 2 * 2  # frames, rows and columns of latents that make a token


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a file holds, as its tensors say.

    kind: "transformer", "vae", "text encoder", "LoRA" or "unknown". tensors: by diffusers' names (transformers' for a
    text encoder). For a transformer: its shape, and whether it has SLA's projections and int8 linears.
    """

    path: Path
    kind: str
    layout: str  # upstream, diffusers
    tensors: dict[str, Tensor]
    arch: catalog.Arch | None = None
    head_dim: int | None = None
    text_dim: int | None = None
    sla: bool = False
    quantized: bool = False

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that most of the file's floating point numbers have."""
        count = {}
        for tensor in self.tensors.values():
            if tensor.is_floating_point():
                count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.numel()
        return max(count, key=count.get) if count else None

    def __str__(self) -> str:
        parameters = f"{sum(t.numel() for t in self.tensors.values()) / 1e9:.2f} B parameters"
        if self.kind == "unknown":
            names = ", ".join(list(self.tensors)[:3])
            return f"{len(self.tensors)} tensors of no kind known here ({names}, …)"
        if self.kind != "transformer":
            return f"a {self.kind}, {parameters}, {self.layout} layout"
        spec, arch = catalog.of_arch(self.arch), self.arch
        name = (
            f"of {spec.name}'s shape" if spec else f"with dim {arch.dim}, {arch.num_layers} layers, ffn {arch.ffn_dim}"
        )
        task = {"t2v": "text-to-video", "i2v": "image-to-video", None: f"{arch.in_channels}-channel"}[arch.task]
        attention = "SLA" if self.sla else "no SLA"
        linears = "int8 linears" if self.quantized else f"{str(self.dtype).removeprefix('torch.')} linears"
        return f"a Wan {task} transformer {name}, {attention}, {linears}, {parameters}, {self.layout} layout"


def read(path: str | Path) -> Contents:
    """Contents of a `.pth` or `.safetensors` file, or of a diffusers folder's safetensors shards.

    Raises CheckpointError for what is not there, damaged, not tensors, or would run code.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted([*path.glob("diffusion_pytorch_model*.safetensors"), *path.glob("model*.safetensors")])
        if not files:
            raise CheckpointError(f"no safetensors weights in {str(path)!r}; is it a folder of diffusers layout?")
    elif path.is_file():
        files = [path]
    else:
        raise CheckpointError(f"no file {str(path)!r}; give the path of a .pth or .safetensors file, or of a folder")
    tensors = {}
    for file in files:
        tensors |= _read_file(file)
    try:
        return recognise(tensors, path)
    except (RuntimeError, IndexError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} has the names of a model and shapes that are none's ({first_line(error)}); fetch it again"
        ) from error


def _read_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{str(path)!r} is empty; fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{str(path)!r} is a Git LFS pointer, not the weights; fetch the file itself")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"{str(path)!r} is a web page, not weights; the download gave an error page, fetch it again"
        )
    try:
        if head.startswith(b"PK"):
            return _read_torch(path)
        if head[8:9] == b"{":
            return load_file(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{str(path)!r} holds more than tensors, and loading it could run code: refused ({first_line(error)})"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever torch's unpickler raises on bytes that are not what they were
        raise CheckpointError(f"{str(path)!r} is damaged or cut short; fetch it again ({first_line(error)})") from error
    raise CheckpointError(
        f"{str(path)!r} is neither a torch file (zip format) nor safetensors; an old torch file opens after "
        "torch.save(torch.load(path, weights_only=True), new_path)"
    )


def _read_torch(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError(f"{str(path)!r} has compressed entries, which torch never writes: refused")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{str(path)!r} holds no state dict but {type(state).__name__}")
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{key} in {str(path)!r} claims more than the file holds: refused")
    return state


def recognise(tensors: dict[str, Tensor], path: Path) -> Contents:
    """What the tensors are, by their names and shapes; renamed as diffusers and transformers have them."""
    tensors = _without_prefix(tensors)
    if any(re.search(r"lora_(A|B|up|down)\b", key) for key in tensors):
        return Contents(path=path, kind="LoRA", layout="peft", tensors=tensors)
    if {"encoder.conv1.weight", "decoder.conv1.weight"} <= tensors.keys():
        return Contents(path=path, kind="vae", layout="upstream", tensors=convert_wan_vae_to_diffusers(tensors))
    if {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= tensors.keys():
        return Contents(path=path, kind="vae", layout="diffusers", tensors=tensors)
    if "token_embedding.weight" in tensors and "blocks.0.pos_embedding.embedding.weight" in tensors:
        return Contents(path=path, kind="text encoder", layout="upstream", tensors=_umt5_names(tensors))
    if "shared.weight" in tensors or "encoder.embed_tokens.weight" in tensors:
        return Contents(path=path, kind="text encoder", layout="transformers", tensors=tensors)
    if "patch_embedding.weight" in tensors and any(key.startswith("blocks.0.") for key in tensors):
        return _recognise_transformer(tensors, path)
    return Contents(path=path, kind="unknown", layout="unknown", tensors=tensors)


def _recognise_transformer(tensors: dict[str, Tensor], path: Path) -> Contents:
    upstream = any(".self_attn." in key for key in tensors)
    if upstream:
        tensors = {
            key.replace(".attn1.attn_op.local_attn.proj_l.", PROJ_L): tensor
            for key, tensor in convert_wan_transformer_to_diffusers(dict(tensors)).items()
        }
        patch = tensors["patch_embedding.weight"]
        if patch.ndim == 2:
            tensors["patch_embedding.weight"] = patch.reshape(patch.shape[0], -1, 1, 2, 2)
    patch = tensors["patch_embedding.weight"]
    projections = [tensor for key, tensor in tensors.items() if PROJ_L + "weight" in key]
    head_dim = projections[0].shape[0] if projections else 128
    ffn = next(
        (t for key, t in tensors.items() if re.match(r"blocks\.0\.ffn\.net\.0\.proj\.(int8_)?weight", key)), None
    )
    text = tensors.get("condition_embedder.text_embedder.linear_1.weight")
    if ffn is None or text is None or patch.ndim < 2:
        raise CheckpointError(f"{str(path)!r} looks like a Wan transformer of which parts are missing; fetch it again")
    arch = catalog.Arch(
        dim=patch.shape[0],
        num_heads=patch.shape[0] // head_dim,
        num_layers=1 + max(int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.", key))),
        ffn_dim=ffn.shape[0],
        in_channels=patch[0].numel() // PATCH,
    )
    return Contents(
        path=path,
        kind="transformer",
        layout="upstream" if upstream else "diffusers",
        tensors=tensors,
        arch=arch,
        head_dim=head_dim,
        text_dim=text.shape[1],
        sla=bool(projections),
        quantized=any(key.endswith(".int8_weight") for key in tensors),
    )


def require(contents: Contents, kind: str, expected: catalog.ModelSpec | None = None) -> None:
    """Raises CheckpointError if a file holds something else, or not the model that was asked for."""
    path = str(contents.path)
    if contents.kind == "LoRA":
        raise CheckpointError(
            f"{path!r} is a LoRA, which changes a model and is none; load the model and add it with load_lora_weights, "
            "or merge it with turbo-nb convert --lora"
        )
    if contents.kind != kind:
        raise CheckpointError(f"{path!r} is {contents}; a {kind} was asked for")
    if expected and expected.arch and contents.arch != expected.arch:
        shape = ", ".join(f"{name} {value}" for name, value in asdict(expected.arch).items())
        raise CheckpointError(f"{path!r} is {contents}; {expected.name} was asked for, which has {shape}")


def listed(names: Iterable[str], most: int = 3) -> str:
    """`a, b, c and 4 more`"""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
