"""Tags and frame times of an mp4, read from its boxes ("atoms") without a process.

An mp4 is a row of boxes: 4 bytes of length, 4 of kind, and the content. The box `moov` describes the clip. In it,
`keys` has the names of the tags and `ilst` their values. ffmpeg writes both into `moov/udta/meta`, for QuickTime into
`moov/meta`.
Source: ISO/IEC 14496-12, and Apple's QuickTime File Format Specification, "Metadata".
"""

import os
from collections.abc import Iterator
from typing import BinaryIO

LARGEST = 64 << 20  # bytes of a `moov` box; a clip's has some KB, because it lists each frame in 8 to 20 bytes
MOST = 64  # boxes at the top of a file; a clip has four


def read_moov(file: BinaryIO) -> bytes:
    """Return the content of a file's `moov` box, or nothing where the file lacks one or is damaged. Raises OSError."""
    for kind, at, start, length, left in _top(file):
        if kind == b"moov":
            file.seek(at + start)
            return file.read(length - start) if length <= min(LARGEST, left) else b""
    return b""


def is_cut(file: BinaryIO) -> bool:
    """Return whether frames go on beyond the end of a file, as those of an interrupted copy do. Raises OSError."""
    return any(kind in (b"mdat", b"moof") and length > left for kind, *_, length, left in _top(file))


def _top(file: BinaryIO) -> Iterator[tuple[bytes, int, int, int, int]]:
    """Yield the kind, place, length of the head, and length of each box of a file, and the bytes up to the end"""
    end, at = file.seek(0, os.SEEK_END), 0
    for _ in range(MOST):
        if at > end:  # a length of 64 bits may lead further than a seek can
            break
        file.seek(at)
        head = file.read(16)
        length, start = int.from_bytes(head[:4], "big"), 8
        if length == 1:  # the length has 64 bits and follows the kind
            length, start = int.from_bytes(head[8:], "big"), 16
        length = length or end - at  # 0: up to the end
        if len(head) < 8 or length < start:
            break
        yield head[4:8], at, start, length, end - at
        at += length


def tags(moov: bytes) -> dict[str, str]:
    """Return the text of each tag in the content of a `moov` box. Damaged parts are left out."""
    found: dict[str, str] = {}
    for holder in (moov, *_content(moov, b"udta")):
        for meta in _content(holder, b"meta"):
            inside = meta if meta[4:8] == b"hdlr" else meta[4:]  # an mp4 has 4 bytes of version here, QuickTime not
            names = [name.decode(errors="replace") for keys in _content(inside, b"keys") for name in _names(keys)]
            for values in _content(inside, b"ilst"):
                for number, value in _boxes(values):
                    index = int.from_bytes(number, "big") - 1
                    for data in _content(value, b"data"):  # 4 bytes of type, 4 of locale, the text
                        if 0 <= index < len(names):
                            found[names[index]] = data[8:].decode(errors="replace")
    return found


def timing(moov: bytes) -> tuple[int, list[float]]:
    """Return how many frames the first video track has, and how many a second.

    Returns:
        The number of frames, 0 where the box is damaged. The rates from the lowest to the highest, of which a clip
        with frames of one length has one. The last frame does not count, because some programs shorten it.
    """
    for track in _content(moov, b"trak"):
        for media in _content(track, b"mdia"):
            header, kinds = b"".join(_content(media, b"mdhd")), [one[8:12] for one in _content(media, b"hdlr")]
            at = 20 if header[:1] == b"\1" else 12  # version 1 has dates of 64 bits
            scale = int.from_bytes(header[at : at + 4], "big")
            tables = [table for info in _content(media, b"minf") for table in _content(info, b"stbl")]
            if kinds == [b"vide"] and scale and tables:
                sizes, times = (b"".join(_content(tables[0], kind)) for kind in (b"stsz", b"stts"))
                return int.from_bytes(sizes[8:12], "big"), _rates(times[8:], scale)
    return 0, []


def _rates(times: bytes, scale: int) -> list[float]:
    """Return the frames a second of a table of times: 4 bytes of a number of frames, 4 of their length"""
    runs = [
        (int.from_bytes(times[at : at + 4], "big"), int.from_bytes(times[at + 4 : at + 8], "big"))
        for at in range(0, len(times) - 7, 8)
    ]
    if len(runs) > 1 and runs[-1][0] == 1:
        runs.pop()
    return sorted({scale / length for _, length in runs if length})


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind and the content of each box"""
    at = 0
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if not 8 <= length <= len(data) - at:
            return
        yield data[at + 4 : at + 8], data[at + 8 : at + length]
        at += length


def _content(data: bytes, kind: bytes) -> Iterator[bytes]:
    return (content for found, content in _boxes(data) if found == kind)


def _names(keys: bytes) -> Iterator[bytes]:
    """Yield the names of the tags: a box each, after 4 bytes of version and 4 of the count"""
    return (name for _, name in _boxes(keys[8:]))
