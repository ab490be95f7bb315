"""Tell what a weight file is by its tensors alone: the kind of model, its shape, whose names and which numbers.

`reading` gives the raw tensors, mapped from the file. `names` and `numbers` hold what is known of conventions.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import catalog
from ..errors import CheckpointError, first_line, listed, warn
from ..values import local
from . import lora_keys, names, numbers, shapes
from .fingerprint import fingerprint
from .gguf_file import GGUFTensor
from .names import PROJ_L
from .numbers import Encoded
from .reading import read_raw
from .shapes import PATCH

HEAD_DIM = 128  # of all of Wan's models
# "high" or "low" as a word before "noise", a resolution or the end of a name
NOISE_LEVEL = re.compile(r"(?i)(?<![a-z])(high|low)(?=[-_ ]?noise|[-_](?:480p|720p)|$)")
# A part of a name that only a model of another family has, and what that family is
FAMILIES = {
    "vace_blocks.": "a VACE transformer, which edits and extends videos",
    "motion_encoder.": "a Wan-Animate transformer",
    "face_adapter.": "a Wan-Animate transformer",
    "audio_injector.": "a Wan speech-to-video transformer",
    "condition_embedder.image_embedder.": "Wan2.1's image-to-video transformer, which reads the image through CLIP",
    ".add_k_proj.": "Wan2.1's image-to-video transformer, which reads the image through CLIP",
    "control_adapter.": "a Wan Fun-Control transformer",
}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a file holds, by its tensors.

    Attributes:
        path: the file or folder.
        kind: "transformer", "vae", "text encoder", "tiny decoder", "LoRA" or "unknown".
        names: whose names the file has: "upstream", "diffusers", "SGLang", "FastVideo", "transformers" and others.
        copy: which of several copies of the model in the file this is; None for a file with one.
        tensors: by diffusers' names; by transformers' names for a text encoder.
        metadata: of the file's header.
        arch: the shape of a transformer.
        head_dim: channels of one attention head of a transformer.
        text_dim: channels of the text embeddings that a transformer reads.
        sla: whether a transformer has SLA's projections.
        family: what a transformer is that only looks like one of Wan's text-to-video or image-to-video models.
        others: kinds of the models that the file has beside this one. `read` takes one of them when asked for it.
    """

    path: Path
    kind: str
    names: str
    copy: str | None = None
    tensors: dict[str, Tensor | Encoded]
    metadata: dict[str, str] = field(default_factory=dict, repr=False)
    arch: catalog.Arch | None = None
    head_dim: int | None = None
    text_dim: int | None = None
    sla: bool = False
    family: str | None = None
    others: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of most of the file's plain floating point numbers; None without any."""
        count = {}
        for tensor in self.tensors.values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.numel()
        return max(count, key=count.get) if count else None

    @property
    def numbers(self) -> str:
        """The number formats of the linears, such as "int8 tiles" or "bfloat16"."""
        return numbers.summary(self.tensors)

    @property
    def quantized(self) -> bool:
        """Whether a transformer has linears whose int8 numbers are kept."""
        return any(is_int8_linear(name, tensor) for name, tensor in self.tensors.items())

    def __str__(self) -> str:
        count = sum(tensor.numel() for tensor in self.tensors.values())
        parameters = f"{count / 1e9:.2f} B parameters" if count >= 1e7 else f"{count:,} parameters"
        if self.kind == "unknown":
            first = ", ".join(list(self.tensors)[:3])
            what = self.family or "of an unknown kind"
            return f"{len(self.tensors)} tensors {what} ({first}, …)"
        stored = f"{self.names} names, {self.numbers}"
        if self.copy is not None:
            stored += f", of several copies {self.copy!r}"
        if self.others:
            stored += f", beside a {' and a '.join(self.others)}"
        if self.kind != "transformer":
            return f"a {self.kind}, {parameters}, {stored}"
        linears = f"{'int8' if self.quantized else self.numbers} linears"
        attention = "SLA" if self.sla else "no SLA"
        return f"{self._model()}, {attention}, {linears}, {parameters}, {stored}"

    def _model(self) -> str:
        arch = self.arch
        shape = f"with dim {arch.dim}, {arch.num_layers} layers, ffn {arch.ffn_dim}"
        if self.family:
            return f"{self.family}, {shape}"
        spec = catalog.of_arch(arch)
        task = {"t2v": "text-to-video", "i2v": "image-to-video", None: f"{arch.in_channels}-channel"}[arch.task]
        return f"a Wan {task} transformer {f'of {spec.name}' + chr(39) + 's shape' if spec else shape}"


def read(path: str | Path, wanted: str | None = None) -> Contents:
    """Read a weight file, the shards of a set, or a folder with one set of weights.

    Args:
        path: a `.safetensors`, `.pth`, `.pt`, `.bin`, `.ckpt` or `.gguf` file, one shard, an index or a folder.
        wanted: the kind to take of a file with several models. None: the transformer first.

    Raises:
        CheckpointError: the file is missing, damaged, holds something other than tensors, or would run code.
    """
    path = Path(local(path))
    raw = read_raw(path)
    with fitting_shapes(path):
        return recognise(raw.tensors, path, raw.metadata, raw.config, wanted)


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
            "Expected the shapes of that model. Download the file again."
        ) from error


def recognise(
    tensors: dict[str, Tensor | GGUFTensor],
    path: Path,
    metadata: dict[str, str] | None = None,
    config: dict | None = None,
    wanted: str | None = None,
) -> Contents:
    """Tell what tensors are by their names and shapes, and rename them as diffusers and transformers do.

    Args:
        tensors: by the file's own names.
        path: of the file.
        metadata: of the header of a safetensors file.
        config: of the folder, whoever wrote it. It tells the size of the heads where no tensor does.
        wanted: as for `read`.

    Raises:
        CheckpointError: the tensors cannot be those of a model, or have a number format that cannot be loaded.
    """
    metadata = metadata or {}
    if lora_keys.is_lora(tensors):
        return Contents(path=path, kind="LoRA", names="LoRA", tensors=dict(tensors), metadata=metadata)
    found = names.sort_out(tensors, path, wanted)
    decoded = numbers.encode(found.tensors, path, metadata)
    common = {"path": path, "names": found.convention, "copy": found.copy, "tensors": decoded, "metadata": metadata,
              "others": found.others}  # fmt: skip
    if found.kind == "transformer":
        return _recognise_transformer(common, config or {})
    if found.kind == "unknown" and {"decoder.1.weight", "encoder.1.weight"} & tensors.keys():
        common["tensors"] = {name: tensor for name, tensor in decoded.items() if name.startswith("decoder.")}
        return Contents(kind="tiny decoder", **common | {"names": "TAEHV's"})
    return Contents(kind=found.kind, **common)


def _recognise_transformer(common: dict, config: dict) -> Contents:
    path, tensors = common["path"], common["tensors"]
    patch = tensors.get("patch_embedding.weight")
    if patch is not None and patch.ndim == 2:  # upstream's layer is a linear
        weight = patch.decode() if isinstance(patch, Encoded) else patch
        tensors["patch_embedding.weight"] = patch = weight.reshape(patch.shape[0], -1, 1, 2, 2)
    ffn = tensors.get("blocks.0.ffn.net.0.proj.weight")
    text = tensors.get("condition_embedder.text_embedder.linear_1.weight")
    if ffn is None or text is None or patch is None or patch.ndim < 2:
        raise CheckpointError(
            f"{str(path)!r} looks like a Wan transformer, but parts are missing. Expected a whole file. "
            "Download it again."
        )
    dim, channels = patch.shape[0], patch.shape[1:].numel() // PATCH
    layers = count_blocks(tensors, "blocks", path)
    projections = [tensor for key, tensor in tensors.items() if PROJ_L + "weight" in key]
    head_dim = projections[0].shape[0] if projections else _head_dim((dim, layers, ffn.shape[0], channels), config)
    if head_dim < 1 or head_dim % 2 or dim % head_dim:  # because RoPE turns pairs of channels
        raise CheckpointError(
            f"{str(path)!r} has attention heads of {head_dim} channels for {dim} in all. Expected an even divisor of "
            f"{dim}. Download the file again."
        )
    arch = catalog.Arch(
        dim=dim, num_heads=dim // head_dim, num_layers=layers, ffn_dim=ffn.shape[0], in_channels=channels
    )
    family = next((what for part, what in FAMILIES.items() if any(part in key for key in tensors)), None)
    if family is None and channels == 48:
        family = "Wan2.2's TI2V-5B transformer, which has a VAE of 48 channels"
    return Contents(
        kind="transformer", arch=arch, head_dim=head_dim, text_dim=text.shape[1], sla=bool(projections), family=family,
        **common,
    )  # fmt: skip


def _head_dim(shape: tuple[int, int, int, int], config: dict) -> int:
    """The channels of a head of a transformer without SLA's projections, whose tensors do not tell them"""
    dim = shape[0]
    heads = config.get("num_attention_heads", config.get("num_heads"))
    if isinstance(heads, int) and 0 < heads <= dim and dim % heads == 0:
        return dim // heads
    same = (a for a in (spec.arch for spec in catalog.MODELS.values())
            if (a.dim, a.num_layers, a.ffn_dim, a.in_channels) == shape)  # fmt: skip
    if known := next(same, None):
        return known.dim // known.num_heads
    if dim % HEAD_DIM:
        warn(f"no tensor tells the size of the attention heads of a model of width {dim}; one head is assumed")
        return dim
    return HEAD_DIM


def is_int8_linear(name: str, tensor: Tensor | Encoded) -> bool:
    """Return whether a tensor of a transformer is the int8 weight of a linear that 8-bit linears keep."""
    return isinstance(tensor, Encoded) and tensor.is_int8 and name.startswith("blocks.") and PROJ_L not in name


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
            "--lora (load_pipeline(loras=[…]) in Python), or merge it with turbo-nb convert --lora."
        )
    if contents.kind != kind:
        raise CheckpointError(f"{path!r} is {contents}. Expected a {kind}. Give the path of a {kind}.")
    if contents.family:
        raise CheckpointError(
            f"{path!r} is {contents}. Expected a model that turbo_nb runs: {', '.join(catalog.MODELS)}. "
            "diffusers runs the other members of the Wan family."
        )
    if expected and expected.arch and contents.arch != expected.arch:
        shape = ", ".join(f"{name} {value}" for name, value in asdict(expected.arch).items())
        raise CheckpointError(f"{path!r} is {contents}. Expected {expected.name}, which has {shape}.")
    check_dtypes(contents, (key for key in contents.tensors if key.endswith("weight")))
    _require_whole(contents)


def _require_whole(contents: Contents) -> None:
    """Raise CheckpointError where a transformer or a text encoder lacks a tensor, or one does not fit"""
    tensors = contents.tensors
    if contents.kind == "transformer":
        wanted = shapes.of_transformer(
            contents.arch, head_dim=contents.head_dim, text_dim=contents.text_dim, sla=contents.sla
        )
    elif contents.kind == "text encoder":
        if shapes.TIED in tensors:
            tensors = {shapes.EMBEDDING: tensors[shapes.TIED]} | tensors
        with fitting_shapes(contents.path):
            wanted = shapes.of_text_encoder(tensors, count_blocks(tensors, "encoder.block", contents.path))
    else:
        return
    require_tensors(contents, tensors, wanted)
    check_dtypes(replace(contents, tensors=tensors), wanted)


def require_tensors(
    contents: Contents, tensors: Mapping[str, Tensor | Encoded], wanted: Mapping[str, Sequence[int]]
) -> None:
    """Check that tensors are those of a model.

    Args:
        contents: what the tensors are of, for errors.
        tensors: by name. Others than the model's are not looked at.
        wanted: the shapes of the model's tensors by name.

    Raises:
        CheckpointError: a tensor is missing or does not fit.
    """
    path = str(contents.path)
    # because a download that broke off loses no single tensors: the file is of another model, or was written in part
    advice = f"Give a {contents.kind} of this model."
    if contents.kind == "vae":
        advice = "Give Wan2.1's vae, or for another one its folder with config.json."
    if missing := wanted.keys() - tensors.keys():
        raise CheckpointError(
            f"{path!r} looks like {contents}. Expected {len(wanted)} tensors, but {len(missing)} are missing: "
            f"{listed(missing)}. {advice}"
        )
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != tuple(shape):
            raise CheckpointError(
                f"{key} in {path!r} has shape {tuple(tensors[key].shape)}. Expected {tuple(shape)}, as in "
                f"{contents}. {advice}"
            )


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


def require_experts(transformers: Sequence[Contents]) -> None:
    """Check that transformers are one text-to-video model, or the two experts of image-to-video in their order.

    The tensors of experts look alike, so the names of files and folders tell which is which.

    Raises:
        CheckpointError: the experts are of another model, in the wrong order, or one expert twice.
    """
    names = [str(part.path) for part in transformers]
    noise = [noise_level(part.path) for part in transformers]
    if transformers[0].arch.task == "t2v" and (len(transformers) > 1 or noise[0]):
        raise CheckpointError(
            f"{' and '.join(map(repr, names))} {'are experts' if len(names) > 1 else 'is one of two experts'} of "
            f"Wan2.2-T2V-A14B. Expected a model that turbo_nb runs: {', '.join(catalog.MODELS)}. "
            "Rename a file whose name says high or low for another reason."
        )
    if len(transformers) != 2:
        return
    if noise in (["low", "high"], ["high", "high"], ["low", "low"]):
        raise CheckpointError(
            f"the experts are {names[0]!r} ({noise[0]} noise) and {names[1]!r} ({noise[1]} noise). Expected the "
            "high-noise expert first, then the low-noise expert. Swap or replace the files."
        )
    if transformers[0].path.exists() and fingerprint(transformers[0].path) == fingerprint(transformers[1].path):
        raise CheckpointError(
            f"the experts are {names[0]!r} and {names[1]!r}, which are the same weights. Expected a high-noise and a "
            "low-noise expert. Replace one of the files."
        )


def noise_level(path: Path) -> str | None:
    """Return "high" or "low" by the name of a file, or else of its folder; None where neither has the word."""
    for name in (path.stem if path.suffix else path.name, path.parent.name):
        if len(found := {word.lower() for word in NOISE_LEVEL.findall(name)}) == 1:
            return found.pop()
    return None


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
            widths["latent channels"][path] = _width(part, "proj_out.weight", axis=0) // PATCH
        elif part.kind == "text encoder":
            table = shapes.EMBEDDING if shapes.EMBEDDING in tensors else shapes.TIED
            widths["text width"][path] = _width(part, table)
        elif part.kind == "vae":
            widths["latent channels"][path] = _width(part, "decoder.conv_in.weight")
    for what, found in widths.items():
        if len(set(found.values())) > 1:
            each = ", ".join(f"{width} in {path!r}" for path, width in found.items())
            raise CheckpointError(
                f"{what} is {each}. Expected the same in all parts of a model. Give parts that belong together."
            )


def _width(part: Contents, name: str, axis: int = 1) -> int:
    """A side of a part's tensor. Raises CheckpointError where the tensor is missing or has fewer dimensions"""
    tensor = part.tensors.get(name)
    if tensor is None or tensor.ndim < 2:
        got = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise CheckpointError(
            f"{name} in {str(part.path)!r} {got}. Expected a tensor of two or more dimensions. Download the file again."
        )
    return tensor.shape[axis]


def check_dtypes(contents: Contents, names: Iterable[str]) -> None:
    """Raise CheckpointError where a tensor of these names holds integers, which no part of a model takes."""
    for name in names:
        tensor = contents.tensors[name]
        if not isinstance(tensor, Encoded) and tensor.dtype not in numbers.FLOATS:
            raise CheckpointError(
                f"{name} in {str(contents.path)!r} is {str(tensor.dtype).removeprefix('torch.')}. "
                f"Expected bfloat16, float16, float32 or float64. {numbers.ADVICE}"
            )
