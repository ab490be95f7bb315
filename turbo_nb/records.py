"""Records that files keep (metadata of an mp4, lines of a manifest, times of earlier clips), and their one reader.

A record is a frozen dataclass. `read` builds it from parsed JSON of any origin. It leaves out unknown fields and fields
of another type, because files come from other versions and other programs.
"""

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
DEEPEST = 32  # levels of a value of any kind
IN_MEMORY = "a picture in memory"
MEASURED = ("timings", "steps", "peaks", "graph", "machine", "cost")  # fields that differ between equal clips


@dataclass(frozen=True, kw_only=True)
class LoRARecord:
    """A LoRA that a clip was made with: its file's name, the hash of its content, and its strength.

    expert: "high" or "low"; None: every expert.
    """

    name: str
    hash: str
    strength: float
    expert: str | None = None


@dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """What CUDA graphs did for a clip.

    Args:
        replayed: steps that a graph computed.
        captured: graphs that were recorded.
        reason: why steps were plain, where a graph does not fit.
    """

    replayed: int = 0
    captured: int = 0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class VideoRecord:
    """How a clip was made, as an mp4 carries it.

    Args:
        original_prompt: what a language model made the prompt from; empty where nobody rewrote it.
        seed: of the clip; of a grid the seeds, one a clip.
        width, height: in pixels, of the clip. A grid's picture is wider.
        quant_linear: whether the linears were 8-bit.
        loras: those that were merged into the model.
        memory_plan, device: where the parts of the model were. gpus: how many made it, None for one.
        timings: seconds by stage. steps: seconds of each denoising step. peaks: most bytes of GPU memory by stage.
        graph: what CUDA graphs did.
        machine: what made the clip. cost: in dollars, None where no price was set.
        job: id of the batch job that made it.
        image: path of the image that the clip begins with, where it came from a file.
        last_image: path of the picture that the clip ends with, `IN_MEMORY` where it did not come from a file.
        parts: the records of the earlier clips that this one extends, in order.
        more: values of other options, by name.
        versions: of this package, torch, diffusers and transformers.
    """

    model: str = ""
    prompt: str = ""
    original_prompt: str = ""
    seed: int | list[int] = 0
    num_steps: int = 4
    num_frames: int | None = None
    width: int | None = None
    height: int | None = None
    fps: int | None = None
    sigma_max: float | None = None
    ode: bool = False
    noise_device: str = "cpu"
    boundary: float | None = None
    image: str | None = None
    last_image: str | None = None
    attention_type: str | None = None
    sla_topk: float | None = None
    quant_linear: bool | None = None
    loras: list[LoRARecord] = field(default_factory=list)
    memory_plan: str | None = None
    device: str | None = None
    gpus: int | None = None
    timings: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    graph: GraphRecord | None = None
    machine: str = ""
    cost: float | None = None
    job: str | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def several_gpus(self) -> str:
        """What made the clip, such as "4 GPUs". Empty for one GPU or a CPU."""
        return f"{self.gpus} GPUs" if self.gpus and self.gpus > 1 else ""

    def without_measurements(self) -> "VideoRecord":
        """Return the record with the fields of `MEASURED` as they are before a clip is made."""
        empty = VideoRecord()
        return replace(self, **{name: getattr(empty, name) for name in MEASURED})


def read(cls: type[Record], data: Any) -> Record | None:
    """Build a record from parsed JSON.

    Args:
        cls: a dataclass.
        data: anything.

    Returns:
        The record. None where data is not an object, or lacks a field that has no default (or has one of another type).
    """
    if not isinstance(data, Mapping):
        return None
    hints, known = _hints(cls), {}
    for one in fields(cls):
        if one.name in data:
            fits, value = _fitted(hints[one.name], data[one.name])
            if fits:
                known[one.name] = value
                continue
        if one.default is MISSING and one.default_factory is MISSING:
            return None
    return cls(**known)


def write(record: Any) -> dict:
    """Return a record as JSON takes it, without the fields that say nothing (None, and empty ones)."""
    return {name: value for name, value in asdict(record).items() if value not in (None, "", [], {})}


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of a record's fields, once, because a gallery reads thousands of records"""
    return get_type_hints(cls)


def _is_flat(value: Any, levels: int = DEEPEST) -> bool:
    """Return whether a value has few levels, because Python's own functions recurse and fail at about 900"""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return levels > 0 and all(_is_flat(one, levels - 1) for one in inner)


def _fitted(kind: Any, value: Any) -> tuple[bool, Any]:
    """Return whether a value has a type, and the value in that type"""
    origin = get_origin(kind)
    if kind is Any:
        return _is_flat(value), value
    if origin in (Union, types.UnionType):
        tried = (_fitted(one, value) for one in get_args(kind))
        return next((one for one in tried if one[0]), (False, None))
    if origin is Literal:
        return value in get_args(kind), value
    if kind is types.NoneType:
        return value is None, None
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        return (True, float(value)) if is_number and math.isfinite(value) else (False, None)
    if kind in (int, bool):
        return type(value) is kind and abs(value) < 1 << 64, value  # a larger one is not a float, nor printed
    if kind is str:
        return isinstance(value, str), value
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False, None
        items = [_fitted(get_args(kind)[0], one) for one in value]
        return all(fits for fits, _ in items), (tuple if origin is tuple else list)(one for _, one in items)
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            return False, None
        item = (get_args(kind) or (str, Any))[1]
        items = {str(name): _fitted(item, one) for name, one in value.items()}
        return True, {name: one for name, (fits, one) in items.items() if fits}
    if is_dataclass(kind):
        record = read(kind, value)
        return record is not None, record
    return False, None
