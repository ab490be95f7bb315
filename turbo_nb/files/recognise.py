"""Weight files: read safely, and told apart by their tensors alone.

`read(path)` never runs code from a file, because pickles load with `weights_only`. It refuses a file that is not an
honest file of tensors before anything is allocated. The tensors are mapped from the file, not copied.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from .. import catalog
from ..errors import CheckpointError, first_line, warn
from .names import PROJ_L, to_transformers_umt5, without_prefix

PATCH = 1 * 2 * 2  # frames, rows and columns of latents that make a token
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FIRST_FFN = ("blocks.0.ffn.net.0.proj.weight", "blocks.0.ffn.net.0.proj.int8_weight")
PARTS = ("transformer", "transformer_2", "vae", "text_encoder")  # folders of weights in a diffusers folder


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a file holds, by its tensors.

    Attributes:
        path: the file or folder.
        kind: "transformer", "vae", "text encoder", "LoRA" or "unknown".
        layout: whose names the file has: "upstream", "diffusers", "transformers", "peft" or "unknown".
        tensors: by diffusers' names; by transformers' names for a text encoder.
        arch: the shape of a transformer.
        head_dim: channels of one attention head of a transformer.
        text_dim: channels of the text embeddings that a transformer reads.
        sla: whether a transformer has SLA's projections.
        quantized: whether a transformer has int8 linears.
    """

    path: Path
    kind: str
    layout: str
    tensors: dict[str, Tensor]
    arch: catalog.Arch | None = None
    head_dim: int | None = None
    text_dim: int | None = None
    sla: bool = False
    quantized: bool = False

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of most of the file's floating point numbers; None without any."""
        count = {}
        for tensor in self.tensors.values():
            if tensor.is_floating_point():
                count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.numel()
        return max(count, key=count.get) if count else None

    def __str__(self) -> str:
        parameters = f"{sum(t.numel() for t in self.tensors.values()) / 1e9:.2f} B parameters"
        if self.kind == "unknown":
            names = ", ".join(list(self.tensors)[:3])
            return f"{len(self.tensors)} tensors of an unknown kind ({names}, …)"
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
    """Read a `.pth` or `.safetensors` file, or the safetensors shards of a folder.

    Raises:
        CheckpointError: the file is missing, damaged, holds something other than tensors, or would run code.
    """
    path, tensors = Path(path), {}
    try:
        for file in _weight_files(path):
            tensors |= _read_file(file)
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({first_line(error)}). Expected a .pth or .safetensors file, or a folder. "
            "Check the name and its permissions."
        ) from error
    with fitting_shapes(path):
        return recognise(tensors, path)


def describe(path: str | Path) -> str:
    """Describe a weight file, a folder of shards, or each part of a diffusers folder, one a line.

    Raises:
        CheckpointError: as `read`.
    """
    path = Path(path)
    if not (parts := _parts(path)):
        return str(read(path))
    lines = [f"{name:{max(map(len, parts))}} {read(path / name)}" for name in parts]
    return "\n".join([f"{str(path)!r} is a diffusers folder:", *lines])


def _parts(path: Path) -> list[str]:
    """The folders of weights in a diffusers folder; empty for anything else"""
    return [] if _shards(path) else [name for name in PARTS if _shards(path / name)]


def _shards(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):  # because Path.is_dir raises OSError for a name that is too long
        return []
    return sorted([*folder.glob("diffusion_pytorch_model*.safetensors"), *folder.glob("model*.safetensors")])


def _weight_files(path: Path) -> list[Path]:
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise CheckpointError(f"no file {str(path)!r}. Expected a .pth or .safetensors file, or a folder.")
    if files := _shards(path):
        return files
    if parts := _parts(path):
        raise CheckpointError(
            f"{str(path)!r} is a diffusers folder of {', '.join(parts)}. Expected one of these. "
            f"Give {str(path / parts[0])!r}, for example."
        )
    raise CheckpointError(
        f"no safetensors weights in {str(path)!r}. Expected a folder in diffusers layout. "
        "Give the path of a .pth or .safetensors file instead."
    )


@contextmanager
def fitting_shapes(path: Path) -> Iterator[None]:
    """Raise CheckpointError, which names `path`, for what tensors or settings of a wrong shape raise."""
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} has the tensor names of a known model, but the shapes do not fit ({first_line(error)}). "
            "Download the file again."
        ) from error


def _read_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        head = file.read(512)
    name = repr(str(path))
    if not head:
        raise CheckpointError(f"{name} is empty. Expected a .pth or .safetensors file. Download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{name} is a Git LFS pointer. Expected the weights. Fetch the file that it points to.")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{name} is a web page. Expected weights. Download the file again.")
    try:
        if head.startswith(b"PK"):
            return _read_torch(path)
        if head[8:9] == b"{":
            return load_file(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{name} holds more than tensors, and loading it could run code: refused ({first_line(error)}). "
            "Expected tensors only. Take a safetensors file."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # because torch's unpickler raises any kind of error on damaged bytes
        raise CheckpointError(
            f"{name} is damaged or cut short ({first_line(error)}). Expected a whole file. Download it again."
        ) from error
    raise CheckpointError(
        f"{name} is neither a torch file (zip format) nor safetensors. Expected one of these. "
        "Convert an old torch file with torch.save(torch.load(path, weights_only=True), new_path)."
    )


def _read_torch(path: Path) -> dict[str, Tensor]:
    name = repr(str(path))
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError(f"{name} has compressed entries: refused. Expected stored entries, as torch writes.")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{name} holds {type(state).__name__}. Expected a state dict: tensors by their names.")
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{name} has the key {key!r} for a tensor. Expected a state dict with text keys.")
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{key} in {name} claims more bytes than the file holds: refused.")
    return state


def recognise(tensors: dict[str, Tensor], path: Path) -> Contents:
    """Tell what tensors are by their names and shapes, and rename them as diffusers and transformers do."""
    tensors = without_prefix(tensors)
    if any(re.search(r"lora_(A|B|up|down)\b", key) for key in tensors):
        return Contents(path=path, kind="LoRA", layout="peft", tensors=tensors)
    if {"encoder.conv1.weight", "decoder.conv1.weight"} <= tensors.keys():
        return Contents(path=path, kind="vae", layout="upstream", tensors=convert_wan_vae_to_diffusers(tensors))
    if {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= tensors.keys():
        return Contents(path=path, kind="vae", layout="diffusers", tensors=tensors)
    if "token_embedding.weight" in tensors and "blocks.0.pos_embedding.embedding.weight" in tensors:
        return Contents(path=path, kind="text encoder", layout="upstream", tensors=to_transformers_umt5(tensors))
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
    ffn = next((tensors[key] for key in FIRST_FFN if key in tensors), None)
    text = tensors.get("condition_embedder.text_embedder.linear_1.weight")
    if ffn is None or text is None or patch.ndim < 2:
        raise CheckpointError(
            f"{str(path)!r} looks like a Wan transformer, but parts are missing. Expected a whole file. "
            "Download it again."
        )
    arch = catalog.Arch(
        dim=patch.shape[0],
        num_heads=patch.shape[0] // head_dim,
        num_layers=count_blocks(tensors, "blocks", path),
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


def count_blocks(tensors: Iterable[str], prefix: str, path: Path) -> int:
    """Count the blocks `prefix`.0, `prefix`.1, … by the tensors' names.

    Raises:
        CheckpointError: a number is left out. One huge number would make a model of as many blocks.
    """
    numbers = {int(match[1]) for key in tensors if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(
            f"{str(path)!r} has tensors of {prefix}.{max(numbers)}, but of {len(numbers)} blocks in all. "
            f"Expected the blocks 0 to {len(numbers) - 1}. Download the file again."
        )
    return len(numbers)


def require(contents: Contents, kind: str, expected: catalog.ModelSpec | None = None) -> None:
    """Check that a file holds what was asked for, in number formats that can be loaded.

    Args:
        contents: of the file.
        kind: as in `Contents`.
        expected: the model that a transformer must have the shape of; None: any.

    Raises:
        CheckpointError: the file holds something else.
    """
    path = str(contents.path)
    if contents.kind == "LoRA":
        raise CheckpointError(
            f"{path!r} is a LoRA, which changes a model. Expected a {kind}. Load the model and add the LoRA with "
            "load_lora_weights, or merge it with turbo-nb convert --lora."
        )
    if contents.kind != kind:
        raise CheckpointError(f"{path!r} is {contents}. Expected a {kind}.")
    if expected and expected.arch and contents.arch != expected.arch:
        shape = ", ".join(f"{name} {value}" for name, value in asdict(expected.arch).items())
        raise CheckpointError(f"{path!r} is {contents}. Expected {expected.name}, which has {shape}.")
    check_dtypes(contents, (key for key in contents.tensors if key.endswith("weight")))


def attention_of(contents: Contents) -> str:
    """Return the attention type of a transformer for which no other was asked.

    It is "sla"; or "original" (dense attention), with a warning, for a file without the projections of SLA's linear
    branch.
    """
    if contents.sla:
        return "sla"
    warn(
        f"{str(contents.path)!r} has no SLA projections, so dense attention is used. "
        "--attention_type sla runs SLA without its linear branch",
        stacklevel=2,
    )
    return "original"


def require_fit(parts: Sequence[Contents]) -> None:
    """Check that the parts of a model have the same widths.

    Args:
        parts: transformers, a VAE and a text encoder, as far as they are here.

    Raises:
        CheckpointError: two parts do not fit together.
    """
    widths: dict[str, dict[str, int]] = {"text width": {}, "latent channels": {}}
    for part in parts:
        path, tensors = str(part.path), part.tensors
        if part.kind == "transformer":
            widths["text width"][path] = part.text_dim
            widths["latent channels"][path] = tensors["proj_out.bias"].shape[0] // PATCH
        elif part.kind == "text encoder":
            table = tensors.get("shared.weight", tensors.get("encoder.embed_tokens.weight"))
            widths["text width"][path] = table.shape[1]
        elif part.kind == "vae":
            widths["latent channels"][path] = tensors["decoder.conv_in.weight"].shape[1]
    for what, found in widths.items():
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{width} in {path!r}" for path, width in found.items())
            raise CheckpointError(f"{what} is {listed}. Expected the same in all parts of a model.")


def check_dtypes(contents: Contents, names: Iterable[str]) -> None:
    """Check that the tensors of these names have number formats that a model can take.

    Raises:
        CheckpointError: an 8-bit or integer tensor stands where plain floats are expected, or the other way around.
    """
    for name in names:
        dtype, int8 = contents.tensors[name].dtype, name.endswith(".int8_weight")
        if dtype is torch.int8 if int8 else dtype in FLOATS:
            continue
        raise CheckpointError(
            f"{name} in {str(contents.path)!r} is {str(dtype).removeprefix('torch.')}. "
            f"Expected {'int8' if int8 else 'bfloat16, float16, float32 or float64'}. "
            "Take the model's bf16 file, or the -quant file of TurboDiffusion."
        )


def listed(names: Iterable[str], most: int = 3) -> str:
    """`a, b, c and 4 more`"""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
