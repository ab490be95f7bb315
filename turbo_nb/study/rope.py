"""The measurements of notebook 02: is the rotary embedding right on this machine, and how fast is it?

The reference shares no code with the implementations under test. It computes the angle of each token from the token's
own number, and multiplies complex numbers in float64.
"""

import html
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .. import backends, rope
from ..errors import InputError, OutputError, TurboNbError, first_line
from ..machine import atomic, environment, probe
from ..ops.compare import relative_error
from ..rope import VideoSize
from ..settings import MAX_POSITIONS
from ..values import PathLike, Whole, several, shown

# Largest relative L2 error: five to ten times what rounding costs
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
RECORDED_BOUND = 1e-3  # of two implementations in bf16, because some numbers are rounded in the other direction
ANGLE_BOUND = 1e-6
CHECK_BYTES, SPEED_BYTES = 73, 23  # peak of main memory a number of x in a check and in a timing, measured on a CPU

Rotation = Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # x (B, L, H, D), cos and sin (L, D/2), interleaved → x's


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison.

    Args:
        name: what was compared.
        error: relative L2 error.
        bound: the largest error that passes.
    """

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound. NaN is not."""
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.name}: rel. L2 {self.error:.1e}, at most {self.bound:.0e}"


@dataclass(frozen=True, kw_only=True)
class RotationCheck(Check):
    """A check of one implementation on random x of one dtype and clip size in latent patches."""

    implementation: str
    dtype: str
    interleaved: bool
    size: VideoSize

    @property
    def tokens(self) -> int:
        """Latent patches of the clip."""
        return math.prod(self.size)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Median time of one call. The bandwidth counts x as read once and written once."""

    implementation: str
    dtype: str
    milliseconds: float
    gigabytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome as data.

    Args:
        machine: name of the device.
        checks: every comparison.
        not_checked: what could not be compared here, and why.
    """

    machine: str
    checks: tuple[Check, ...]
    not_checked: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there is a check, and every check passed."""
        return bool(self.checks) and not self.failed

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]

    def to_dict(self) -> dict:
        """Return plain data for JSON. An error that is not finite becomes None."""
        checks = [
            {"name": c.name, "error": c.error if math.isfinite(c.error) else None, "bound": c.bound, "passed": c.passed}
            for c in self.checks
        ]
        return {"passed": self.passed} | asdict(self) | {"checks": checks}

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, with the folder where that does not exist. Raises InputError and OutputError."""
        path = Path(PathLike()("path", path))
        try:
            atomic.write(path, json.dumps(self.to_dict(), indent=2) + "\n")
        except (OSError, ValueError) as error:  # ValueError: a path without a name, such as "."
            raise OutputError(
                f"cannot write {shown(path)}: {first_line(error)}. Expected a file's name. Choose another."
            ) from error
        return path

    def summary(self) -> str:
        """Return the verdict as JSON, with the number of checks and the names of those that failed."""
        short = {"checks": len(self.checks), "failed": [check.name for check in self.failed]}
        return json.dumps(self.to_dict() | short, indent=2, ensure_ascii=False)

    def require(self) -> None:
        """Raise TurboNbError, with the worst check, unless every check passed."""
        if not self.checks:
            raise TurboNbError("the verdict has 0 checks. Expected at least one. Give one or more sizes and dtypes.")
        if self.failed:
            worst = max(self.failed, key=lambda c: math.inf if math.isnan(c.error) else c.error / c.bound)
            raise TurboNbError(
                f"RoPE is wrong here: {len(self.failed)} of {len(self.checks)} checks failed. The worst is "
                f"{worst.name} with rel. L2 {worst.error:.2g}. Expected at most {worst.bound:.2g}. Do not trust clips "
                "made here. If only flash_attn failed, set TURBO_NB_ROPE=reference."
            )

    def _repr_html_(self) -> str:
        colour, word = ("#1f9d4d", "passed") if self.passed else ("#d6404a", "FAILED")
        head = f"{word}: {len(self.checks) - len(self.failed)} of {len(self.checks)} checks, {self.machine}"
        rows = "".join(
            f'<tr><th scope="row">{html.escape(c.name)}</th><td>{c.error:.2g}</td><td>{c.bound:.2g}</td></tr>'
            for c in self.failed
        )
        columns = "".join(f'<th scope="col">{name}</th>' for name in ("check", "rel. L2", "at most"))
        table = f"<table><caption>Failed checks</caption><tr>{columns}</tr>{rows}</table>" if rows else ""
        notes = "".join(f"<div>not checked: {html.escape(note)}</div>" for note in self.not_checked)
        # the text keeps the page's own colour, because the page may be light or dark
        style = f"border-left:6px solid {colour};padding:.4em .8em"
        return f'<div role="status" style="{style}"><b>{html.escape(head)}</b>{table}{notes}</div>'


def exact_angles(size: VideoSize, head_dim: int) -> Tensor:
    """Return the angles of every token, written out column by column: (T·H·W, head_dim/2) float64."""
    spatial = head_dim // 6 * 2
    token = torch.arange(math.prod(size))
    places = (token // (size[1] * size[2]), token // size[2] % size[1], token % size[2])
    return torch.stack(
        [
            place.double() / 10000.0 ** (2 * pair / channels)
            for place, channels in zip(places, (head_dim - 2 * spatial, spatial, spatial), strict=True)
            for pair in range(channels // 2)
        ],
        dim=-1,
    )


def exact_rotation(x: Tensor, angles: Tensor, interleaved: bool = True) -> Tensor:
    """Multiply each pair of channels, as a complex number, by e^(i·angle): x (B, L, H, D) → the same in float64."""
    pairs = x.double().unflatten(-1, (-1, 2)) if interleaved else x.double().unflatten(-1, (2, -1)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_real(turned)
    return (pairs if interleaved else pairs.mT).flatten(-2)


def real_rotation(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Rotate with four products of real numbers for each pair, as the formula is usually written."""
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.float().chunk(2, dim=-1)
    rotated = a * cos - b * sin, a * sin + b * cos
    return (torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)).to(x.dtype)


def implementations(device: str) -> tuple[dict[str, Rotation], tuple[str, ...]]:
    """Return what can rotate on a device, by name, and one line for each implementation that was rejected."""
    found = {"turbo_nb": rope.apply_rotary_emb_torch, "four products": real_rotation}
    choice = backends.choose("rope")
    if not choice.implementation.is_reference and device.startswith("cuda"):
        found[choice.chosen] = choice.function
    reasons = dict(choice.rejected)
    if "flash_attn" not in found:
        reasons.setdefault("flash_attn", f"not for device {device!r}")
    return found, tuple(f"{name}: {reason}" for name, reason in reasons.items() if name not in found)


def _size(name: str, value: Any, heads: int, head_dim: int, device: str, number_bytes: int) -> VideoSize:
    """Return a size of latent patches. Raises InputError, also where the device has too little memory for it"""
    side = Whole(1, MAX_POSITIONS, "Give frames, rows and columns, such as [7, 30, 52].")
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise InputError(f"{name} is {shown(value)}. Expected 3 whole numbers. {side.fix}")
    size = VideoSize(*(side(name, one) for one in value))
    needed = math.prod(size) * heads * sum(rope.axis_channels(head_dim).values()) * number_bytes
    if needed > (free := probe.free_memory(device)):
        raise InputError(
            f"{name} is {[*size]}, which takes {needed / 1e9:,.2f} GB with head_dim {head_dim}. Expected at most "
            f"{free / 1e9:,.2f} GB, which are free on {device}. Give a smaller size."
        )
    return size


def rotation_errors(
    found: Mapping[str, Rotation],
    sizes: Iterable[VideoSize],
    *,
    head_dim: int = 128,
    heads: int = 2,
    dtypes: Iterable[str] = ("float32", "float16", "bfloat16"),
    device: str = "cpu",
) -> list[RotationCheck]:
    """Check every implementation against `exact_rotation`, for each size, dtype and pairing of channels.

    Args:
        found: implementations by name. They get the angles of `rope_freqs`, so a wrong grid shows too.
        sizes: of clips, in latent patches.
        head_dim, heads: of the noise (1, T·H·W, heads, head_dim) that is rotated.
        dtypes: names of torch dtypes.
        device: where it runs.

    Raises:
        InputError: a size is not 3 whole numbers, or takes more memory than is free. Or head_dim cannot be used.
    """
    wanted, checks = [_size("sizes", one, heads, head_dim, device, CHECK_BYTES) for one in several(sizes)], []
    if not wanted:
        raise InputError(f"sizes is {shown(sizes)}. Expected at least one size. Give [[7, 30, 52]].")
    for size in wanted:
        angles = exact_angles(size, head_dim).to(device)
        freqs = rope.rope_freqs(size, head_dim).to(device)
        noise = torch.randn(1, math.prod(size), heads, head_dim, generator=torch.Generator().manual_seed(0)).to(device)
        for dtype in dtypes:
            x = noise.to(getattr(torch, dtype))
            for interleaved in (True, False):
                exact = exact_rotation(x, angles, interleaved)
                for name, rotate in found.items():
                    out = rotate(x, freqs.cos(), freqs.sin(), interleaved)
                    pairing = "interleaved" if interleaved else "halves"
                    checks.append(
                        RotationCheck(
                            name=f"{name}, {dtype}, {pairing}, {'×'.join(map(str, size))}",
                            error=relative_error(out, exact), bound=BOUNDS[x.dtype],
                            implementation=name, dtype=dtype, interleaved=interleaved, size=size,
                        )
                    )  # fmt: skip
    return checks


def recorded_checks(path: str | Path, found: Mapping[str, Rotation], device: str = "cpu") -> list[Check]:
    """Check every implementation against output of flash_attn that was recorded on another machine, in bf16.

    Args:
        path: tests/golden/ops.safetensors of the repository.
        found: implementations by name.
        device: where they run.

    Returns:
        The checks, an empty list where the file does not exist.

    Raises:
        InputError: it is another file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(PathLike()("path", path))
    if not environment.exists(path):
        return []
    try:
        recorded = load_file(path)
        x, angles, out = (recorded[f"rope.{name}"].to(device) for name in ("x", "freqs", "out"))
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(
            f"path is {shown(path)}, which lacks the recorded output ({first_line(error)}). Expected "
            "tests/golden/ops.safetensors of the repository. Correct the path."
        ) from error
    ours = rope.rope_freqs(VideoSize(3, 6, 8), x.shape[-1]).to(device)
    checks = [Check(name="angles, recorded", error=relative_error(ours, angles), bound=ANGLE_BOUND)]
    for name, rotate in found.items():
        error = relative_error(rotate(x, ours.cos(), ours.sin(), True), out)
        checks.append(Check(name=f"{name}, flash_attn's recorded output", error=error, bound=RECORDED_BOUND))
    return checks


def judge(device: str, rotations: Iterable[Check], recorded: Sequence[Check], rejected: Iterable[str]) -> Verdict:
    """Return the verdict.

    Args:
        device: that was tested.
        rotations, recorded: the checks.
        rejected: the second result of `implementations`.
    """
    not_checked = [line for line in rejected if line.startswith("flash_attn")]
    if not recorded:
        not_checked.append("flash_attn's recorded output: the file comes with a checkout of the repository")
    checks = (*rotations, *recorded)
    return Verdict(machine=probe.device_name(device), checks=checks, not_checked=tuple(not_checked))


def correct(found: Mapping[str, Rotation], checks: Iterable[RotationCheck]) -> dict[str, Rotation]:
    """Return the implementations that passed every check."""
    wrong = {check.implementation for check in checks if not check.passed}
    return {name: rotate for name, rotate in found.items() if name not in wrong}


def rotation_speeds(
    found: Mapping[str, Rotation],
    size: VideoSize,
    *,
    head_dim: int = 128,
    heads: int = 12,
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    device: str = "cpu",
    repeats: int = 7,
) -> list[Speed]:
    """Time each implementation on x (1, T·H·W, heads, head_dim).

    Args:
        found: implementations by name.
        size: of a clip, in latent patches (T, H, W).
        head_dim, heads: of x.
        dtypes: names of torch dtypes.
        device: where it runs.
        repeats: calls that are timed, after one that is not.

    Raises:
        InputError: the size is not 3 whole numbers, or takes more memory than is free. Or head_dim cannot be used.
    """
    size = _size("size", size, heads, head_dim, device, SPEED_BYTES)
    freqs = rope.rope_freqs(size, head_dim).to(device)
    cos, sin = freqs.cos(), freqs.sin()
    speeds = []
    for dtype in dtypes:
        x = torch.randn(1, math.prod(size), heads, head_dim, device=device).to(getattr(torch, dtype))
        for name, rotate in found.items():
            seconds = []
            for _ in range(repeats + 1):
                begin = _now(device)
                rotate(x, cos, sin, True)
                seconds.append(_now(device) - begin)
            typical = median(seconds[1:])
            moved = 2 * x.numel() * x.element_size() / typical / 1e9
            speeds.append(
                Speed(implementation=name, dtype=dtype, milliseconds=typical * 1e3, gigabytes_per_second=moved)
            )
    return speeds


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()
