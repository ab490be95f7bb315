"""Kinds of values: each checks a Python value and reads the text of a cell. `settings` declares options with them.

A kind is called as kind(name, value). It returns the value in its own type, or raises InputError: what was got, what is
allowed, what to do.
"""

import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Any, Literal

from .errors import InputError

ADDRESS = re.compile(r"\s*([a-z][a-z0-9+.-]+):/", re.IGNORECASE)  # one slash, because a Path has one; not C:/
MAX_STRENGTH = 100  # of a LoRA; useful ones are below 5, and bfloat16 overflows far above


@dataclass(frozen=True)
class Whole:
    """A whole number from `least` to `most`. numpy's integers count; True and False do not."""

    least: int
    most: int
    fix: str = ""
    type: type = int

    def __call__(self, name: str, value: Any) -> int:
        try:
            number = None if _is_boolean(value) else operator.index(value)
        except TypeError:
            number = None
        if number is None or not self.least <= number <= self.most:
            raise wrong(name, value, f"a whole number from {self.least} to {self.most}", self.fix)
        return number


@dataclass(frozen=True)
class Count:
    """A whole number from 1, or "all". The command line gives text."""

    most: int
    type: type = str

    def __call__(self, name: str, value: Any) -> int | str:
        if isinstance(value, str) and value == "all":
            return "all"
        number = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,4}", value) else value
        return Whole(1, self.most, 'Or take "all".')(name, number)


@dataclass(frozen=True)
class Number:
    """A finite number in an interval; `words` names the interval."""

    inside: Callable[[float], bool]
    words: str
    fix: str = ""
    type: type = float

    def __call__(self, name: str, value: Any) -> float:
        try:
            number = math.nan if _is_boolean(value) or isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and self.inside(number)):
            raise wrong(name, value, f"a number {self.words}", self.fix)
        return number


@dataclass(frozen=True)
class Flag:
    """True or False. numpy's booleans count; text and numbers do not."""

    type: type = bool

    def __call__(self, name: str, value: Any) -> bool:
        if not _is_bool(value):
            raise wrong(name, value, "True or False")
        return bool(value)


@dataclass(frozen=True)
class Choice:
    """One of some words, or one of `more`: values such as True that are not words."""

    words: tuple[str, ...]
    more: tuple = ()
    fix: str = ""

    @property
    def type(self) -> Any:
        return Literal[self.words]

    def __call__(self, name: str, value: Any) -> Any:
        if _is_bool(value) and bool(value) in self.more:
            return bool(value)
        if not isinstance(value, str) or value not in self.words:
            allowed = ", ".join([*self.words, *map(str, self.more)])
            raise wrong(name, value, f"one of {allowed}", self.fix or closest(value, self.words))
        return _plain(value)


@dataclass(frozen=True)
class Text:
    """Text that is not empty; `pattern` and `words` describe its form."""

    words: str
    pattern: str = r"(?s).*\S.*"
    fix: str = ""
    type: type = str

    def __call__(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(self.pattern, value):
            raise wrong(name, value, self.words, self.fix)
        if re.search("[\ud800-\udfff]", value):
            raise wrong(name, value, "text that UTF-8 can encode", "Remove the lone surrogates, such as '\\ud800'.")
        return _plain(value)


@dataclass(frozen=True)
class Sides(Text):
    """Text that names a size, or a pair of whole numbers: width and height."""

    def __call__(self, name: str, value: Any) -> str:
        if isinstance(value, tuple | list) and len(value) == 2:
            with suppress(TypeError):
                return super().__call__(name, "x".join(str(operator.index(side)) for side in value))
        return super().__call__(name, value)


@dataclass(frozen=True)
class Prompt(Text):
    """Text for one clip."""

    def __call__(self, name: str, value: Any) -> str:
        if isinstance(value, list | tuple):
            raise wrong(name, value, "text, for one clip", "Call turbo_nb.batch.run for several prompts.")
        return super().__call__(name, value)


@dataclass(frozen=True)
class PathLike:
    """A path as text or Path, whose `~` is expanded.

    Args:
        pair: whether two of them are a value, too.
        hub: whether an address of the Hub is a value, too.
    """

    pair: bool = False
    hub: bool = False
    type: type = Path

    def __call__(self, name: str, value: Any) -> Any:
        if self.pair and isinstance(value, tuple | list) and len(value) == 2:
            return tuple(PathLike(hub=self.hub)(name, one) for one in value)
        if not _is_path(value):
            raise wrong(name, value, "a path" + (", or a pair of paths (high-noise, low-noise)" if self.pair else ""))
        return local(value, name, hub=self.hub)


def _is_path(value: Any) -> bool:
    """Return whether a value is a path that the system takes: not empty, without NUL and lone surrogates"""
    try:
        encoded = os.fsencode(value) if isinstance(value, str | os.PathLike) else b""
    except UnicodeEncodeError:
        return False
    return bool(encoded) and b"\0" not in encoded


@dataclass(frozen=True, kw_only=True)
class LoRAFile:
    """A LoRA as it was asked for. Its text is FILE:STRENGTH, with high= or low= in front for one expert.

    Args:
        file: a path, or a name in the folder of LoRAs.
        strength: the factor of what it changes. 0 changes nothing.
        expert: "high" or "low": only the expert for high or for low noise. None: every expert.
    """

    file: str
    strength: float = 1.0
    expert: Literal["high", "low"] | None = None

    def __str__(self) -> str:
        return f"{f'{self.expert}=' if self.expert else ''}{self.file}:{self.strength}"


@dataclass(frozen=True)
class LoRAFiles:
    """LoRAs, each as "FILE", "FILE:STRENGTH", a path, or (FILE, STRENGTH). A single one needs no list."""

    type: type = list[str]

    def __call__(self, name: str, value: Any) -> tuple[LoRAFile, ...]:
        if isinstance(value, str | os.PathLike | LoRAFile) or self._is_pair(value):
            value = [value]
        if not isinstance(value, list | tuple):
            raise self._wrong(name, value)
        return tuple(self._one(name, one) for one in value)

    def _one(self, name: str, value: Any) -> LoRAFile:
        given = value
        if isinstance(value, LoRAFile):
            file, strength, expert = value.file, value.strength, value.expert
        else:
            value, strength = value if self._is_pair(value) else (value, None)
            file = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
            expert, file = file.split("=", 1) if _EXPERT.match(file) else (None, file)
            file = local(file, name, hub=True)
            if strength is None:
                file, strength = _with_strength(file)
        if not isinstance(file, str) or not _is_path(file.strip()) or expert not in (None, "high", "low"):
            raise self._wrong(name, given)
        strength = Number(lambda x: abs(x) <= MAX_STRENGTH, f"from -{MAX_STRENGTH} to {MAX_STRENGTH}, such as 0.8")(
            f"strength of {file!r} in {name}", strength
        )
        return LoRAFile(file=file, strength=strength, expert=expert)

    def _is_pair(self, value: Any) -> bool:
        """Return whether a value is (FILE, STRENGTH), and not two LoRAs"""
        return isinstance(value, list | tuple) and len(value) == 2 and not isinstance(value[1], _LORA_TYPES)

    def _wrong(self, name: str, value: Any) -> InputError:
        return wrong(name, value, "FILE, FILE:STRENGTH or (FILE, STRENGTH), with high= or low= for one of two experts")


_EXPERT = re.compile(r"(high|low)=.")
_LORA_TYPES = (str, os.PathLike, LoRAFile, list, tuple)


def _with_strength(text: str) -> tuple[str, float]:
    """Split FILE:STRENGTH. What follows the last colon is a part of the name unless it is a number"""
    file, colon, strength = text.rpartition(":")
    if colon and file and not os.path.isfile(text):
        with suppress(ValueError):
            return file, float(strength)
    return text, 1.0


@dataclass(frozen=True)
class Anything:
    """A value whose own reader checks it. The `~` of a path is expanded."""

    type: type = Path

    def __call__(self, name: str, value: Any) -> Any:
        return with_home(value) if isinstance(value, str | Path) else value


def with_home(path: Any) -> Any:
    """Return a path with `~` or `~name` in front expanded, because a shell leaves it in --option=~/file.

    Raises:
        InputError: it is not a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise wrong("path", path, "a path, as text or Path")
    if not os.fspath(path).startswith("~"):
        return path
    try:
        expanded = os.path.expanduser(path)
    except ValueError:  # NUL or a lone surrogate in the name, which whoever opens the path reports
        return path
    return type(path)(expanded) if isinstance(path, str | Path) else expanded


def local(path: Any, name: str = "path", *, hub: bool = False) -> Any:
    """Return a path on this machine as `with_home` does.

    Args:
        path: text or Path.
        name: of the path, for errors.
        hub: whether an http address may name files of the Hub. Its own reader checks it.

    Raises:
        InputError: it is not a path, or an address such as s3://bucket/x.mp4, which would be a folder called "s3:".
    """
    found = with_home(path)
    address = ADDRESS.match(os.fsdecode(found))
    if address and not (hub and address[1].lower() in ("http", "https")):
        raise wrong(
            name, path, "a path on this machine" + (" or the name of a file on the Hub" if hub else ""),
            "Copy the file from or to that place with its own program, or mount the place here.",
        )  # fmt: skip
    return found


def several(value: Any) -> list:
    """Return the values of a parameter that takes a list. A single value needs no list, and None is an empty one."""
    if value is None:
        return []
    return [value] if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable) else [*value]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy's own type counts


def _is_boolean(value: Any) -> bool:
    """Return whether a value is a bool, or an array or a tensor of them, which Python takes for 0 and 1"""
    return _is_bool(value) or str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool"


def _plain(text: str) -> str:
    """Return text as str itself, because str() of an Enum's member is the member's name"""
    return str.__str__(text)


def closest(value: Any, words: Iterable[str]) -> str:
    """Return a question that offers the word most like the value, "" where none is like it."""
    close = get_close_matches(str(value), list(words), n=1, cutoff=0.7)
    return f"Did you mean {close[0]!r}?" if close else ""


def shown(value: Any, length: int = 80) -> str:
    """Return the repr of a value for an error message, in one line.

    Args:
        value: a `Path` appears as text of up to 300 characters.
        length: characters of any other value. A longer one loses its middle, because a path ends in the file's name.
    """
    if isinstance(value, PurePath):
        value, length = str(value), 300
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))  # of an array or a tensor
    except (ValueError, RecursionError):  # Python prints no integer of more than 4300 digits, and no deep nesting
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    head = length * 2 // 3
    return text if len(text) <= length else f"{text[:head]}…{text[head + 1 - length :]}"


def wrong(name: str, value: Any, allowed: str, fix: str = "") -> InputError:
    """NAME is GOT. Expected ALLOWED. FIX"""
    return InputError(" ".join(filter(None, [f"{name} is {shown(value)}.", f"Expected {allowed}.", fix])))
