"""LoRAs: read in the spellings of all trainers, fitted to a transformer, and merged into its weights one at a time.

A LoRA changes a weight W to W + strength · alpha / rank · B A (Hu et al., arXiv:2106.09685). DoRA then gives each row
or column of W + alpha / rank · B A a trained length (Liu et al., arXiv:2402.09353). The strength interpolates between W
and the result. Some files also hold plain differences of weights, biases, norms and modulations.

Merging reads each weight from the model's file, so another strength needs neither a copy nor another load.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, InputError, TurboNbError, collect_warnings, listed, warn
from ..machine import environment
from ..records import LoRARecord
from ..values import LoRAFile, local
from . import layouts, lora_keys, recognise
from .fingerprint import fingerprint
from .reading import read_raw
from .recognise import Contents
from .reference import snapshot

FOLDER = "TURBO_NB_LORAS"  # names the folder of LoRAs
IN_FOLDER = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")  # PEFT, diffusers
LISTED = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
CONFIG = "adapter_config.json"  # of PEFT, beside its file


@dataclass(frozen=True, eq=False, kw_only=True)
class Change:
    """What a LoRA does to one tensor of a transformer.

    Args:
        keys: of the file.
        down, up: the factors A (rank, in, …) and B (out, rank, …). None: only `diff`.
        scale: alpha / rank.
        magnitude: DoRA's lengths: (out, 1, …) of rows, or (1, in, …) of columns. None: not a DoRA.
        diff: a difference that is added as it is.
    """

    keys: tuple[str, ...]
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0
    magnitude: Tensor | None = None
    diff: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The rank of the factors."""
        return None if self.down is None else self.down.shape[0]

    @cached_property
    def is_zero(self) -> bool:
        """Whether this changes nothing, whatever the weight is."""
        factors = self.down is not None and self.scale and self.down.float().any() and self.up.float().any()
        return not (factors or self.magnitude is not None or (self.diff is not None and self.diff.float().any()))

    def misfit(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Return the shape that this was made for, where that is not `shape`."""
        shape = tuple(shape)
        rest = math.prod(shape[1:])
        if self.down is not None and (self.up.numel() != shape[0] * self.rank or self.down[0].numel() != rest):
            return self.up.shape[0], *self.down.shape[1:]
        if self.magnitude is not None:
            lengths = self.magnitude.shape
            allowed = {(side, *pair) for side, pair in zip(shape, ((shape[0], 1), (1, *shape[1:2])), strict=False)}
            if (lengths.numel(), *lengths[:2]) not in allowed:
                return tuple(lengths)
        if self.diff is not None and not _same(self.diff.shape, shape):
            return tuple(self.diff.shape)
        return None

    def of(self, weight: Tensor) -> Tensor:
        """Return the difference that this makes to a weight at strength 1, in float32."""
        change = torch.zeros((), device=weight.device)
        if self.down is not None:
            up, down = (x.to(weight.device, torch.float32).flatten(1) for x in (self.up, self.down))
            change = (up @ down).mul_(self.scale).reshape(weight.shape)
            if self.magnitude is not None:
                change = self._with_magnitude(weight + change) - weight
        if self.diff is not None:
            change = change + self.diff.to(weight.device, torch.float32).reshape(weight.shape)
        return change

    def _with_magnitude(self, weight: Tensor) -> Tensor:
        """m · V / ‖V‖, with the norm of each row or column (arXiv:2402.09353, equation 5)"""
        magnitude = self.magnitude.to(weight.device, torch.float32)
        of_rows = magnitude.shape[0] == weight.shape[0]
        axes = [axis for axis in range(weight.ndim) if axis != (0 if of_rows else 1)]
        norm = weight.norm(dim=axes, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return weight * (magnitude.reshape(norm.shape) / norm)


def _same(one: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether two shapes are the same, up to axes of length 1 and a kernel that is flattened"""
    if math.prod(one) != math.prod(other):
        return False
    long = [[side for side in shape if side != 1] for shape in (one, other)]
    return long[0] == long[1] or (one[0] == other[0] and 2 in (len(one), len(other)))


@dataclass(frozen=True, eq=False, kw_only=True)
class LoRA:
    """A LoRA's file.

    Args:
        path: of the file.
        changes: by diffusers' names of the tensors.
        foreign: keys that name no tensor of a Wan transformer.
        keys: the number of keys in the file.
        alpha: how the file gives alpha: its values, or nothing.
        stamp: size and time of the file, which tell whether it is still the same.
    """

    path: Path
    changes: dict[str, Change] = field(repr=False)
    foreign: tuple[str, ...] = field(repr=False)
    keys: int
    alpha: tuple[float, ...] = ()
    stamp: tuple[int, int]
    _warned: set[frozenset[str]] = field(default_factory=set, repr=False)

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.name

    @cached_property
    def hash(self) -> str:
        """The hash of the file's content."""
        return fingerprint(self.path)

    def __str__(self) -> str:
        ranks = sorted({change.rank for change in self.changes.values() if change.rank})
        factors = sum(change.rank is not None for change in self.changes.values())
        parts = [f"rank {_span(ranks)}"] if ranks else []
        parts += [f"alpha {_span(self.alpha)}"] if self.alpha else []
        parts += [f"{factors} modules"] if factors else []
        if differences := sum(change.diff is not None for change in self.changes.values()):
            parts.append(f"{differences} differences")
        parts += [f"{len(self.foreign)} keys of other models"] if self.foreign else []
        kind = "DoRA" if any(change.magnitude is not None for change in self.changes.values()) else "LoRA"
        keys = [key for change in self.changes.values() for key in change.keys if not key.endswith(".alpha")]
        return f"a {kind}, {', '.join(parts)}, keys such as {(keys or self.foreign)[0]}"


def _span(values: Iterable[float]) -> str:
    values = sorted(values)
    return f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Applied:
    """A LoRA with a strength.

    Args:
        lora: the file.
        strength: the factor of its changes. 0 changes nothing.
        expert: "high" or "low": only that one of two experts. None: every transformer.
        changed: the names of the tensors that `apply` has changed so far.
    """

    lora: LoRA
    strength: float = 1.0
    expert: str | None = None
    changed: set[str] = field(default_factory=set, repr=False)

    @property
    def record(self) -> LoRARecord:
        """What a clip's metadata has of it."""
        return LoRARecord(name=self.lora.name, hash=self.lora.hash, strength=self.strength, expert=self.expert)

    def applies_to(self, expert: int) -> bool:
        """Return whether it changes a transformer; 0: the only one, or the high-noise expert."""
        return self.expert is None or self.expert == ("high", "low")[expert]


def find(file: str) -> Path:
    """Return the path of a LoRA.

    Args:
        file: a file, a folder of PEFT or diffusers, or a name (with or without `.safetensors`) in the folder of LoRAs:
            TURBO_NB_LORAS, or `loras` in the current directory.

    Raises:
        CheckpointError: the file does not exist.
    """
    path, near = Path(local(file, "lora")), folder()
    for place in [path] if path.name != file else [path, near / path, near / f"{file}.safetensors"]:
        if environment.is_file(place):
            return place
        if environment.is_dir(place) and (found := _file_in(place)):
            return found
    raise CheckpointError(
        f"no LoRA {file!r}. Expected FILE or FILE:STRENGTH, such as style.safetensors:0.8. Give the path of a file, or "
        f"the name of one in {str(near)!r}."
    )


def folder() -> Path:
    """Return the folder of LoRAs: TURBO_NB_LORAS, or `loras` in the current directory."""
    return environment.folder_of(FOLDER) or Path("loras")


def _file_in(place: Path) -> Path | None:
    """Return the LoRA of a folder that PEFT or diffusers wrote, or the only one in it"""
    own = [place / name for name in IN_FOLDER if environment.is_file(place / name)]
    found = own or sorted(place.glob("*.safetensors"))
    return found[0] if len(found) == 1 or own else None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What the folder of LoRAs holds.

    Args:
        folder: its path.
        files: paths of the LoRAs by their names in the folder, in alphabetical order.
        left_out: what the other weight files are, by name, such as "is a LoKr".
        error: why the folder cannot be read. Empty if it can be, or does not exist.
    """

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    error: str = ""


def available() -> Listing:
    """List the folder of LoRAs. Reads the names of tensors of new files only, and raises nothing for any file."""
    place = Path(os.path.abspath(folder()))
    result = Listing(folder=place)
    try:
        with os.scandir(place) as entries:
            names_here = sorted((entry.name for entry in entries), key=lambda name: (name.casefold(), name))
    except FileNotFoundError:
        return result
    except (OSError, ValueError) as error:  # ValueError for a name with a null byte
        return replace(result, error=getattr(error, "strerror", None) or str(error))
    for name in names_here:
        try:
            if (path := _weights(place / name)) is None:
                continue
            stat = path.stat()
            reason = _unsuitable(path, (stat.st_size, stat.st_mtime_ns))
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        shown = os.fsencode(name).decode(errors="replace")
        if shown != name:  # because a page cannot show it
            reason = "has a name that is not UTF-8"
        if reason:
            result.left_out[shown] = reason
        else:
            result.files[name] = path
    return result


def _weights(path: Path) -> Path | None:
    """Return the file that an entry of the folder of LoRAs is; None for one that is not weights"""
    if path.name.startswith("."):
        return None
    if environment.is_dir(path):
        return _file_in(path)
    return path if environment.is_file(path) and path.name.lower().endswith(LISTED) else None


@lru_cache(maxsize=4096)
def _unsuitable(path: Path, stamp: tuple[int, int]) -> str:
    """Say what a file is instead of a LoRA that can be merged, by the names of its tensors; "" for such a LoRA"""
    try:
        keys = _keys(path)
    except TurboNbError as error:
        return str(error).removeprefix(repr(str(path))).strip().split(". ")[0]
    if other := lora_keys.other_kind(keys):
        return f"is {other[0]}"
    modules = [found[0] for found in map(lora_keys.parse, keys) if found]
    if not modules:
        return "is not a LoRA"
    return "" if any(modules) else "is a LoRA of another kind of model"


def _keys(path: Path) -> list[str]:
    """The names of a file's tensors; of a safetensors file without its tensors, because a folder has many files"""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        with collect_warnings():
            return list(read_raw(path).tensors)


def read(path: str | Path) -> LoRA:
    """Read a LoRA. The tensors stay mapped from the file.

    Raises:
        CheckpointError: the file cannot be read, is not a LoRA of a kind that can be merged, or is damaged.
    """
    return of_contents(recognise.read(path))


def describe(path: str | Path) -> str:
    """Describe a LoRA, or any other file or folder as `layouts.describe` does.

    Raises:
        CheckpointError: as `read`.
    """
    path = snapshot(Path(local(path)))
    if environment.is_dir(path):
        adapters = [path / name for name in IN_FOLDER if environment.is_file(path / name)]
        return str(read(adapters[0])) if adapters else layouts.describe(path)
    if layouts.is_tokenizer(path):
        return layouts.describe(path)
    contents = recognise.read(path)
    return str(of_contents(contents) if contents.kind == "LoRA" else contents)


def of_contents(contents: Contents) -> LoRA:
    """Return the LoRA that `recognise.read` has read; raises CheckpointError as `read`."""
    path = contents.path
    if other := lora_keys.other_kind(contents.tensors):
        raise CheckpointError(
            f"{str(path)!r} is {other[0]} (it has {other[1]}). Expected a LoRA or a DoRA. Merge it with its own tool, "
            "or convert it to a LoRA."
        )
    if contents.kind != "LoRA":
        raise CheckpointError(f"{str(path)!r} is {contents}. Expected a LoRA. Give the path of a LoRA.")
    modules: dict[str, dict[str, tuple[str, Tensor]]] = {}
    foreign = []
    for key, tensor in contents.tensors.items():
        found = lora_keys.parse(key)
        if found:
            _check_tensor(key, tensor, path)
        if not found or found[0] is None:
            foreign.append(key)
            continue
        module, part = found
        other, _ = modules.setdefault(module, {}).setdefault(part, (key, tensor))
        if other != key:
            raise CheckpointError(
                f"{str(path)!r} has {other} and {key} for one module. Expected one LoRA in a file. Save each as a file "
                "of its own."
            )
    config, changes, alphas = _config(contents), {}, set()
    for module, parts in modules.items():
        keys = {part: key for part, (key, _) in parts.items()}
        tensors = {part: tensor for part, (_, tensor) in parts.items()}
        alpha = _alpha(module, keys, tensors, config, path)
        if alpha is not None and "down" in tensors:
            alphas.add(alpha)
        changes |= _changes(module, keys, tensors, alpha, config, path)
    used = {key for change in changes.values() for key in change.keys}
    foreign += [key for parts in modules.values() for key, _ in parts.values() if key not in used]
    stat = path.stat()
    return LoRA(
        path=path,
        changes=changes,
        foreign=tuple(foreign),
        keys=len(contents.tensors),
        alpha=tuple(sorted(alphas)),
        stamp=(stat.st_size, stat.st_mtime_ns),
    )


def _check_tensor(key: str, tensor: Tensor, path: Path) -> None:
    """Raise CheckpointError for integers, and for numbers that are not finite"""
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{key} in {str(path)!r} is a tensor of GGUF. Expected a LoRA as safetensors.")
    if tensor.is_complex() or (not tensor.is_floating_point() and tensor.numel() > 1):
        raise CheckpointError(
            f"{key} in {str(path)!r} is {str(tensor.dtype).removeprefix('torch.')}. Expected floating point numbers. "
            "Take a bf16 or float32 file."
        )
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.float().aminmax()):
        raise CheckpointError(
            f"{key} in {str(path)!r} holds NaN or Inf. Expected finite numbers. Take another file, because this "
            "training has failed."
        )


def _config(contents: Contents) -> dict:
    """The settings of PEFT: in the header of diffusers' files, or in adapter_config.json beside PEFT's file"""
    header = getattr(contents, "metadata", {}).get("lora_adapter_metadata")
    beside = contents.path.with_name(CONFIG)
    try:
        if header is not None:
            return {key.removeprefix("transformer."): value for key, value in json.loads(header).items()}
        if contents.path.name in IN_FOLDER and beside.is_file():
            return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (AttributeError, OSError, RecursionError, TypeError, ValueError):
        warn(f"the settings of the LoRA {str(contents.path)!r} cannot be read, so alpha is taken to be the rank")
    return {}


def _alpha(module: str, keys: dict, tensors: dict, config: dict, path: Path) -> float | None:
    """Return alpha of a module; None where it is the rank"""
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise CheckpointError(
                f"{keys['alpha']} in {str(path)!r} has shape {tuple(tensors['alpha'].shape)}. Expected one number. "
                "Download the file again."
            )
        return float(tensors["alpha"])
    patterns = config.get("alpha_pattern") if isinstance(config.get("alpha_pattern"), dict) else {}
    own = next((value for end, value in patterns.items() if f".{module}".endswith(f".{end}")), None)
    alpha = config.get("lora_alpha") if own is None else own
    with suppress(OverflowError):  # JSON has integers of any length
        return float(alpha) if isinstance(alpha, int | float) and math.isfinite(alpha) else None
    return None


def _changes(
    module: str, keys: dict[str, str], tensors: dict[str, Tensor], alpha: float | None, config: dict, path: Path
) -> dict[str, Change]:
    """The changes of one module's tensors, by name"""
    for part, needs in (("down", "up"), ("up", "down"), ("dora_scale", "down"), ("lora_magnitude_vector", "down")):
        if part in tensors and needs not in tensors:
            wanted = {"up": "lora_up (lora_B)", "down": "lora_down (lora_A)"}[needs]
            raise CheckpointError(
                f"{keys[part]} in {str(path)!r} is without {wanted} of the same module. Expected both. Download the "
                "file again."
            )
    target = module if module.endswith(lora_keys.TABLE) else f"{module}.weight"
    weight, scale, bias = {}, 1.0, tensors.get("diff_b")
    if "down" in tensors:
        down, up = tensors["down"], tensors["up"]
        rank = down.shape[0] if down.ndim > 1 else 0
        if not rank or up.ndim < 2 or up.shape[1] != rank or up.numel() != up.shape[0] * rank:
            raise CheckpointError(
                f"{keys['up']} in {str(path)!r} has shape {tuple(up.shape)}, and {keys['down']} {tuple(down.shape)}. "
                "Expected (out, rank) and (rank, in). Download the file again."
            )
        root = math.sqrt(rank) if config.get("use_rslora") is True and "alpha" not in tensors else rank
        scale = 1.0 if alpha is None else alpha / root
        weight = {"down": down, "up": up, "scale": scale, "magnitude": _magnitude(tensors)}
    if "diff" in tensors:
        weight["diff"] = tensors["diff"]
    if "diff_m" in tensors:
        weight["diff"] = tensors["diff_m"]
    if "up_bias" in tensors:
        own = scale * tensors["up_bias"].float()
        bias = own if bias is None else bias.float() + own
    changes = {}
    bias_parts = ("diff_b", "up_bias")
    if weight:
        changes[target] = Change(keys=tuple(key for part, key in keys.items() if part not in bias_parts), **weight)
    if bias is not None:
        changes[f"{module}.bias"] = Change(keys=tuple(keys[part] for part in bias_parts if part in keys), diff=bias)
    return changes


def _magnitude(tensors: dict[str, Tensor]) -> Tensor | None:
    """DoRA's lengths: LyCORIS has those of rows or columns in the weight's shape, PEFT those of rows in a vector"""
    if "lora_magnitude_vector" in tensors:
        return tensors["lora_magnitude_vector"].reshape(-1, 1)
    scale = tensors.get("dora_scale")
    return scale.reshape(-1, 1) if scale is not None and scale.ndim < 2 else scale


def fit(lora: LoRA, shapes: Mapping[str, Sequence[int]], *, quiet: bool = False) -> None:
    """Check a LoRA against a transformer. Warns, once, of keys that match none of its tensors.

    Args:
        lora: the file.
        shapes: of the transformer's tensors by diffusers' names; a linear's weight is `….weight` in 8 bits as well.
        quiet: do not warn.

    Raises:
        CheckpointError: no key matches, a shape does not fit, or the LoRA changes nothing.
    """
    path, matched = str(lora.path), {name: change for name, change in lora.changes.items() if name in shapes}
    others = [key for name, change in lora.changes.items() if name not in shapes for key in change.keys]
    others += lora.foreign
    if not matched:
        raise CheckpointError(
            f"{path!r} has {lora.keys} keys that all match no tensor of this model ({listed(others)}). Expected a LoRA "
            "of a Wan transformer. Take one that was trained for this model."
        )
    for name, change in matched.items():
        if (made_for := change.misfit(shapes[name])) is not None:
            raise CheckpointError(
                f"{change.keys[0]} in {path!r} is made for a tensor of shape {made_for}. Expected "
                f"{tuple(shapes[name])}, the shape of {name} in this model. Take a LoRA of a model of this size "
                "and task (text-to-video or image-to-video)."
            )
    if all(change.is_zero for change in matched.values()):
        raise CheckpointError(
            f"{path!r} is zero in all {len(matched)} tensors that it could change. Expected a LoRA that changes the "
            "model. Take another file, because this one was not trained."
        )
    if others and not quiet and frozenset(others) not in lora._warned:
        lora._warned.add(frozenset(others))
        warn(f"{len(others)} of the {lora.keys} keys of {path!r} match no tensor of the model; left out: "
             f"{listed(others)}", stacklevel=2)  # fmt: skip


def identity(loras: Iterable[Applied]) -> dict:
    """Return what a clip depends on: empty without a LoRA, and for LoRAs that change nothing."""
    used = [[one.lora.hash, one.strength, one.expert] for one in loras if one.strength]
    return {"loras": sorted(used, key=str)} if used else {}


@torch.no_grad()
def apply(name: str, weight: Tensor, loras: Sequence[Applied]) -> Tensor:
    """Return a weight with the changes of some LoRAs added; `changed` of each LoRA that changes it gets its name.

    Args:
        name: diffusers' name of the tensor.
        weight: as the model's file has it, in float32 on any device. It stays as it is.
        loras: what to add. Their sum does not depend on their order, up to rounding.

    Raises:
        CheckpointError: the result is not finite.
    """
    result = weight
    for applied in touching(name, loras):
        change = applied.strength * applied.lora.changes[name].of(weight)
        if not torch.equal(weight + change, weight):
            applied.changed.add(name)
            result = result + change
    if result is not weight and not all(extreme.isfinite() for extreme in result.aminmax()):
        files = ", ".join(f"{str(one.lora.path)!r} at strength {one.strength:g}" for one in touching(name, loras))
        raise CheckpointError(f"{name} is NaN or Inf with {files}. Expected finite numbers. Take a smaller strength.")
    return result


def differing(before: Iterable[Applied], after: Iterable[Applied]) -> list[str]:
    """Return the names of the tensors that two sets of LoRAs change in different ways."""
    before, after = list(before), list(after)
    names = dict.fromkeys(name for one in (*before, *after) if one.strength for name in one.lora.changes)
    effect = lambda name, loras: [(one.lora, one.strength) for one in touching(name, loras)]  # noqa: E731
    return [name for name in names if effect(name, before) != effect(name, after)]


def touching(name: str, loras: Iterable[Applied]) -> list[Applied]:
    """Return the LoRAs that change a tensor: those with a strength other than 0 that have a change for it."""
    return [one for one in loras if one.strength and name in one.lora.changes]


def require_changed(loras: Sequence[Applied]) -> int:
    """Return how many tensors were changed. Raises CheckpointError for a LoRA that has changed none."""
    for one in loras:
        if one.strength and not one.changed:
            raise CheckpointError(
                f"{str(one.lora.path)!r} at strength {one.strength:g} changed 0 tensors. Expected a LoRA that changes "
                "the model. Take another file or another strength."
            )
    return len(set().union(*(one.changed for one in loras)))


def _warn_of_expert(lora: LoRA, expert: str | None) -> None:
    """Warn, once, of a LoRA that goes to another expert than its name says"""
    level = recognise.noise_level(lora.path)
    if level in (None, expert) or (key := frozenset({f"{level} for {expert}"})) in lora._warned:
        return
    lora._warned.add(key)
    place = f"the {expert}-noise expert" if expert else "both experts"
    warn(f"{str(lora.path)!r} is for {level} noise by its name, but goes to {place}; write {level}=FILE for the "
         f"{level}-noise expert alone", stacklevel=3)  # fmt: skip


def choose(asked: Sequence[LoRAFile], experts: int, known: Iterable[Applied] = ()) -> tuple[Applied, ...]:
    """Read the LoRAs that were asked for.

    Args:
        asked: as in `LoadOptions.loras`.
        experts: the number of transformers of the model.
        known: LoRAs that were read before, and may be merged. One whose file is still the same is not read again.

    Raises:
        InputError: high= or low= for a model with one transformer.
        CheckpointError: as `find` and `read`.
    """
    for one in asked:
        if one.expert and experts == 1:
            raise InputError(
                f"lora is {str(one)!r}. Expected FILE or FILE:STRENGTH, because the model has one expert. Leave "
                f"{one.expert}= out."
            )
    known = list(known)
    read_before = {one.lora.path: one.lora for one in known}
    result = []
    for one in asked:
        path = find(one.file)
        lora = read_before.get(path)
        stat = path.stat()
        if lora is None or lora.stamp != (stat.st_size, stat.st_mtime_ns):
            lora = read_before[path] = read(path)
        if experts > 1:
            _warn_of_expert(lora, one.expert)
        # what it changed stays known for another expert as well, because an expert that keeps it is not read again
        same = [old for old in known if (old.lora, old.strength) == (lora, one.strength)]
        changed = set().union(*(old.changed for old in same))
        new = Applied(lora=lora, strength=one.strength, expert=one.expert, changed=changed)
        result.append(next((old for old in same if old.expert == one.expert), new))
    return tuple(result)
