"""SentencePiece models: the tokenizer that ComfyUI stores in a text encoder's file, or a file `spiece.model`.

A model is a protocol buffer (sentencepiece_model.proto in google/sentencepiece). This module reads the few fields that
encoding needs, because no other part of the package needs the packages sentencepiece and protobuf. The package
tokenizers encodes.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from ..errors import CheckpointError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNIGRAM = 1
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = range(1, 5)
SPACE = "▁"


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What a SentencePiece model says.

    Args:
        pieces: each piece and its score. The place of a piece is its id.
        kinds: of the pieces.
        unk, eos, pad: ids. pad is -1 in a model without padding.
        byte_fallback: whether an unknown character becomes the pieces of its bytes.
        charsmap: rules that normalise characters, in SentencePiece's own format.
        add_prefix, remove_spaces, escape_spaces: what else is done to a text before it is encoded.
    """

    pieces: list[tuple[str, float]]
    kinds: list[int]
    unk: int
    eos: int
    pad: int
    byte_fallback: bool
    charsmap: bytes
    add_prefix: bool
    remove_spaces: bool
    escape_spaces: bool


def count_pieces(data: bytes, name: str) -> int:
    """Return the number of pieces, without reading them.

    Raises:
        CheckpointError: the bytes, which the error calls `name`, are not a protocol buffer.
    """
    try:
        return sum(number == 1 for number, _ in _fields(data))
    except ValueError as error:
        raise _damaged(name, error) from error


def parse(data: bytes, name: str) -> SentencePieceModel:
    """Read a SentencePiece model.

    Args:
        data: the bytes.
        name: of the bytes, for errors.

    Raises:
        CheckpointError: the bytes are damaged, or another kind of model.
    """
    try:
        return _checked(_parse(data))
    except (KeyError, TypeError, ValueError, struct.error) as error:  # a field is missing, or has another type
        raise _damaged(name, error) from error


def tokenizer(model: SentencePieceModel, extra_ids: int = 0) -> "PreTrainedTokenizerFast":
    """Return the tokenizer that encodes as the model's own program does, and ends a text with the token eos.

    Args:
        model: from `parse`.
        extra_ids: how many words `<extra_id_0>`, … follow the pieces, the last word first, as in seqio.
    """
    from transformers import PreTrainedTokenizerFast

    pieces = [piece for piece, _ in model.pieces]
    encoder = Tokenizer(Unigram(model.pieces, unk_id=model.unk, byte_fallback=model.byte_fallback))
    encoder.normalizer = normalizers.Sequence(_normalizers(model))
    user_defined = [piece for piece, kind in zip(pieces, model.kinds, strict=True) if kind == USER_DEFINED]
    if user_defined:  # they are never merged with other characters
        pattern = "|".join(_escaped(piece) for piece in sorted(user_defined, key=len, reverse=True))
        encoder.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    encoder.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    eos, pad = pieces[model.eos], pieces[max(model.pad, 0)]
    encoder.post_processor = processors.TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, model.eos)])
    extra = [f"<extra_id_{index}>" for index in reversed(range(extra_ids))]
    encoder.add_special_tokens([AddedToken(word, normalized=False) for word in extra])
    return PreTrainedTokenizerFast(
        tokenizer_object=encoder, unk_token=pieces[model.unk], eos_token=eos, pad_token=pad,
        additional_special_tokens=extra[::-1],
    )  # fmt: skip


def _normalizers(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    """The steps that SentencePiece's normalizer.cc takes, in its order"""
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_spaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    space = SPACE if model.escape_spaces else " "
    steps += [normalizers.Replace(" ", space)]
    if model.add_prefix:
        steps += [normalizers.Prepend(space)]
    if model.remove_spaces:
        steps += [normalizers.Replace(Regex(rf"{space}+\z"), "")]
    return steps


def _escaped(piece: str) -> str:
    return "".join(f"\\x{{{ord(character):x}}}" for character in piece)


def _parse(data: bytes) -> SentencePieceModel:
    pieces, kinds, trainer, normalizer = [], [], {}, {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((str(piece[1], "utf-8"), _float(piece.get(2, 0))))
            kinds.append(piece.get(3, NORMAL))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if trainer.get(3, UNIGRAM) != UNIGRAM:
        raise ValueError("it is not a unigram model")
    if trainer.get(24, 0):
        raise ValueError("it treats spaces as suffixes")
    return SentencePieceModel(
        pieces=pieces,
        kinds=kinds,
        unk=_signed(trainer.get(40, 0)),
        eos=_signed(trainer.get(42, 2)),
        pad=_signed(trainer.get(43, -1)),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=bytes(normalizer.get(2, b"")),
        add_prefix=bool(normalizer.get(3, 1)),
        remove_spaces=bool(normalizer.get(4, 1)),
        escape_spaces=bool(normalizer.get(5, 1)),
    )


def _checked(model: SentencePieceModel) -> SentencePieceModel:
    """The model itself. Raises ValueError for one that cannot encode."""
    count = len(model.pieces)
    if len({piece for piece, _ in model.pieces}) != count or any(not piece for piece, _ in model.pieces):
        raise ValueError("a piece is empty, or is there twice")
    if not all(math.isfinite(score) for _, score in model.pieces):
        raise ValueError("a score is not finite")
    if not (0 <= model.unk < count and 0 <= model.eos < count and -1 <= model.pad < count):
        raise ValueError(f"unk is {model.unk}, eos {model.eos} and pad {model.pad}, of {count} pieces")
    if model.kinds[model.unk] != UNKNOWN or model.kinds[model.eos] != CONTROL:
        raise ValueError("the pieces unk and eos are of another kind")
    if model.charsmap:
        _check_charsmap(model.charsmap)
    return model


def _check_charsmap(data: bytes) -> None:
    """Raise ValueError for rules that lead out of their tables, because tokenizers does not check them.

    The rules are a darts-clone trie, whose leaves are offsets of texts, and these texts.
    """
    size = int.from_bytes(data[:4], "little")
    texts = np.frombuffer(data[4 + size :], np.uint8)
    if size % 1024 or not size or size + 4 >= len(data):
        raise ValueError("the table of characters is cut short")
    bytes(texts).decode("utf-8")
    units = np.frombuffer(data[4 : 4 + size], "<u4").astype(np.int64)
    inner = (units >> 31) == 0
    children = np.arange(len(units)) ^ ((units >> 10) << ((units & 512) >> 6))  # of the byte 0; the leaf is there
    if (children[inner] | 255).max(initial=0) >= len(units) or not inner[0]:
        raise ValueError("the table of characters leads out of itself")
    leaves = units[children[inner & (units >> 8 & 1 == 1)]] & 0x7FFFFFFF
    if leaves.max(initial=0) >= len(texts) or (texts[leaves] >> 6 == 2).any():  # 2: within a character
        raise ValueError("the table of characters leads out of its texts")


def _fields(data: bytes) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol buffer: numbers as integers, all else as bytes. Raises ValueError for damaged bytes."""
    data, place = memoryview(data), 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while shift < 64:
            if place == len(data):
                raise ValueError("it is cut short")
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number is too long")

    while place < len(data):
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if not number or wire not in (0, 1, 2, 5):
            raise ValueError("it is not a protocol buffer")
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if size > len(data) - place:
            raise ValueError("it is cut short")
        place += size
        yield number, data[place - size : place]


def _float(value: memoryview | int) -> float:
    return struct.unpack("<f", value)[0] if value else 0.0


def _signed(value: int) -> int:
    """An int32, which a protocol buffer stores in 64 bits"""
    return value - 2**64 if value >= 2**63 else value


def _damaged(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name} is not a SentencePiece model that can be read ({first_line(error)}). Expected umT5's tokenizer. "
        "Give --tokenizer_path a folder with a tokenizer, for example that of google/umt5-xxl."
    )
