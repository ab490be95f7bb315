"""The released models: their files, their shapes and their defaults."""

import json
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from .errors import UnknownModelError

ASSETS = Path(__file__).parent / "assets"

# width × height, by resolution and aspect ratio
RESOLUTIONS = {
    "480p": {"1:1": (640, 640), "4:3": (640, 480), "3:4": (480, 640), "16:9": (832, 480), "9:16": (480, 832)},
    "720p": {"1:1": (960, 960), "4:3": (960, 720), "3:4": (720, 960), "16:9": (1280, 720), "9:16": (720, 1280)},
}
SIZE_MULTIPLE = 16  # pixels: 8 of the VAE times a patch of 2


# A prompt for a model that reads any text (these were trained on long prompts), and one for a model with a vocabulary
EXAMPLES = (
    "A small wooden boat drifts across a calm mountain lake at sunrise, mist rising slowly from the water, pine woods "
    "and snowy peaks mirrored on its surface; soft golden light, gentle ripples, the camera glides forward, cinematic.",
    "a large red circle moving from left to right on a black background",
)


@dataclass(frozen=True)
class HubFile:
    """A file of a Hub repository, or a folder of it. Its text is a reference.

    Attributes:
        repo: owner and name.
        path: within the repository; a folder ends with "/", and "/" is the repository's own.
        revision: a branch, tag or commit; None: main.
        kind: "weights" or "tokenizer", which tells what a folder's files are.
        commit: what the revision is, where that was looked up; None: whatever it is when it is fetched.
    """

    repo: str
    path: str
    revision: str | None = None
    kind: str = "weights"
    commit: str | None = None

    @property
    def name(self) -> str:
        """Repository and path."""
        return f"{self.repo}/{self.path}".rstrip("/")

    def __str__(self) -> str:
        revision = self.commit or self.revision
        return f"{self.name}@{revision}" if revision else self.name


VAE = HubFile("Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1_VAE.pth")
TEXT_ENCODER = HubFile("Wan-AI/Wan2.1-T2V-1.3B", "models_t5_umt5-xxl-enc-bf16.pth")
TOKENIZER = HubFile("google/umt5-xxl", "/", kind="tokenizer")
TINY_DECODER = HubFile("Kijai/WanVideo_comfy", "taew2_1.safetensors")  # a copy of madebyollin/taehv's file


@dataclass(frozen=True, kw_only=True)
class Arch:
    """The shape of a Wan transformer. in_channels: 16 for text-to-video, 36 for image-to-video."""

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_channels: int = 16

    @property
    def task(self) -> str | None:
        """ "t2v" or "i2v"; None for another number of channels."""
        return {16: "t2v", 36: "i2v"}.get(self.in_channels)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model and its defaults.

    Attributes:
        name: of the catalogue, or of the file.
        arch: the transformer's shape; None: any.
        task: "t2v" (text-to-video), or "i2v" (image-to-video) with two experts.
        size: (width, height) in pixels.
        num_frames: 4n + 1.
        fps: frames per second.
        sla_topk: share of the key blocks, in (0, 1].
        sigma_max: noise level of the first step.
        boundary: noise level below which the low-noise expert takes over; None: one expert.
        folder: of the weights in diffusers layout; None: they are on the Hub.
        files: on the Hub: one, or (high-noise, low-noise).
        quant_files: the same with int8 linears.
        license: of the weights; None: that of the files, which the package does not know.
    """

    name: str
    arch: Arch | None = None
    task: str = "t2v"
    size: tuple[int, int]
    num_frames: int
    fps: int
    sla_topk: float
    sigma_max: float
    boundary: float | None = None
    folder: Path | None = None
    files: tuple[HubFile, ...] = ()
    quant_files: tuple[HubFile, ...] = ()
    license: str | None = None

    def needs(self, quantized: bool = False) -> tuple[HubFile, ...]:
        """Return the files on the Hub that the model is made of; with 8-bit linears if `quantized`."""
        weights = self.quant_files if quantized else self.files
        return (*weights, VAE, TEXT_ENCODER, TOKENIZER) if weights else ()

    @property
    def example(self) -> str:
        """A prompt that suits the model."""
        return EXAMPLES[self.vocabulary is not None]

    @cached_property
    def vocabulary(self) -> dict[str, dict[str, list[str]]] | None:
        """The words that the model knows, by attribute and value; None for a model that reads any prompt."""
        path = self.folder and self.folder / "vocabulary.json"
        return json.loads(path.read_text(encoding="utf-8"))["attributes"] if path and path.exists() else None

    @cached_property
    def preview(self) -> list[list[float]] | None:
        """The factors of `video.preview` that ship with the model; None: its first clip has to be measured."""
        path = self.folder and self.folder / "preview.json"
        return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else None

    def understands(self, prompt: str) -> bool:
        """Return whether the prompt names a shape and a colour of the vocabulary; True without a vocabulary."""
        if self.vocabulary is None:
            return True
        words = [{word for words in self.vocabulary[name].values() for word in words} for name in ("shape", "colour")]
        return all(any(re.search(rf"\b{re.escape(w)}\b", prompt, re.IGNORECASE) for w in known) for known in words)


NANO = ModelSpec(
    name="nano",
    arch=Arch(dim=256, num_heads=4, num_layers=7, ffn_dim=960),
    folder=ASSETS / "nano",
    size=(128, 128),
    num_frames=25,
    fps=16,
    sla_topk=0.15,
    sigma_max=80.0,
    license="Apache-2.0",
)
ARCH_1_3B = Arch(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
ARCH_14B = Arch(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
ARCH_A14B = replace(ARCH_14B, in_channels=36)


def _released(
    name: str, stems: tuple[str, ...], arch: Arch, resolution: str, sigma_max: float = 80.0, **more
) -> ModelSpec:
    """A model of the Hub organisation TurboDiffusion: `<stem>.pth` and `<stem>-quant.pth`"""
    return ModelSpec(
        name=name,
        arch=arch,
        size=RESOLUTIONS[resolution]["16:9"],
        num_frames=81,
        fps=16,
        sla_topk=0.1,
        files=tuple(HubFile(f"TurboDiffusion/{name}", f"{stem}.pth") for stem in stems),
        quant_files=tuple(HubFile(f"TurboDiffusion/{name}", f"{stem}-quant.pth") for stem in stems),
        sigma_max=sigma_max,
        # the Hub's licence field of TurboWan2.1-T2V-1.3B-480P, TurboWan2.1-T2V-14B-720P and google/umt5-xxl, and the
        # section "License Agreement" in the README of Wan2.1 and Wan2.2, which the weights were made from
        license="Apache-2.0",
        **more,
    )


def _released_t2v(name: str, arch: Arch, resolution: str) -> ModelSpec:
    return _released(name, (name,), arch, resolution)


MODELS = {
    spec.name: spec
    for spec in (
        NANO,
        _released_t2v("TurboWan2.1-T2V-1.3B-480P", ARCH_1_3B, "480p"),
        _released_t2v("TurboWan2.1-T2V-14B-480P", ARCH_14B, "480p"),
        _released_t2v("TurboWan2.1-T2V-14B-720P", ARCH_14B, "720p"),
        _released(
            "TurboWan2.2-I2V-A14B-720P",
            ("TurboWan2.2-I2V-A14B-high-720P", "TurboWan2.2-I2V-A14B-low-720P"),
            ARCH_A14B, "720p", task="i2v", sigma_max=200.0, boundary=0.9,
        ),
    )
}  # fmt: skip
# upstream's names for --model → the catalogue's names
UPSTREAM_NAMES = {
    "Wan2.1-1.3B": "TurboWan2.1-T2V-1.3B-480P",
    "Wan2.1-14B": "TurboWan2.1-T2V-14B-480P",
    "Wan2.2-A14B": "TurboWan2.2-I2V-A14B-720P",
}


def tokens_of(width: int, height: int, num_frames: int) -> int:
    """Return the tokens of a clip: latents of 4 frames and 8x8 pixels (the first frame alone), in patches of 1x2x2.

    Args:
        width, height: in pixels.
        num_frames: 4n + 1.
    """
    return (1 + (num_frames - 1) // 4) * (height // 16) * (width // 16)


def find(model: str) -> ModelSpec:
    """Return the model of a name, ours or upstream's. `files.decide` decides what "auto" is on a machine.

    Raises:
        UnknownModelError: the name is unknown.
    """
    name = UPSTREAM_NAMES.get(model, model)
    if name in MODELS:
        return MODELS[name]
    known = ", ".join(["auto", *MODELS, *UPSTREAM_NAMES])
    close = get_close_matches(model, [*MODELS, *UPSTREAM_NAMES], n=1)
    paths = ", the path of a checkpoint or of a diffusers folder, or a Hub id such as owner/repo/file.safetensors."
    hint = f"; did you mean {close[0]!r}?" if close else paths
    raise UnknownModelError(f"unknown model {model!r}. Expected one of {known}{hint}")


def of_repo(repo: str) -> ModelSpec | None:
    """Return the model whose files a Hub repository has; None for another repository."""
    return next((spec for spec in MODELS.values() if spec.files and spec.files[0].repo == repo), None)


def of_file(file: HubFile) -> ModelSpec | None:
    """Return the model that a file of the Hub belongs to; None for another file."""
    spec = of_repo(file.repo)
    return spec if spec and file.path in {one.path for one in (*spec.files, *spec.quant_files)} else None


def of_arch(arch: Arch) -> ModelSpec | None:
    """Return the first model of this shape; None for an unknown shape."""
    return next((spec for spec in MODELS.values() if spec.arch == arch), None)


def unnamed(name: str, arch: Arch, task: str) -> ModelSpec:
    """Return Wan's defaults for a model of another shape."""
    like = find("Wan2.2-A14B" if task == "i2v" else "Wan2.1-1.3B")
    return replace(like, name=name, arch=arch, size=RESOLUTIONS["480p"]["16:9"], files=(), quant_files=(),
                   license=None)  # fmt: skip
