"""Give memory back to the system while a large file is read.

A file that is mapped counts as memory of the process, page by page as it is read, until it is unmapped. A weight that
was decoded is not needed again, so `PageReleaser` drops its pages. The file still has them, and they can be read again.
"""

import ctypes
import mmap
import sys
from contextlib import suppress

BATCH = 16 << 20  # bytes that are collected before the mappings are looked up; more would raise the peak
DONTNEED = 4  # MADV_DONTNEED of Linux


class PageReleaser:
    """Collects spans of memory that have been read, and drops the pages of those that a file backs.

    Nothing happens on systems other than Linux.
    """

    def __init__(self):
        self._spans: list[tuple[int, int]] = []
        self._bytes = 0

    def done(self, address: int, size: int) -> None:
        """Take `size` bytes from `address` on as read."""
        self._spans.append((address, address + size))
        self._bytes += size
        if self._bytes >= BATCH:
            self.release()

    def release(self) -> None:
        """Drop the pages of all spans so far, and let the allocator return what it does not use."""
        spans, self._spans, self._bytes = self._spans, [], 0
        if not spans or not sys.platform.startswith("linux"):
            return
        with suppress(OSError, AttributeError):  # because another C library may lack one of these functions
            libc = ctypes.CDLL(None, use_errno=True)
            mappings = _file_mappings()
            for begin, end in spans:
                begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                # only pages of files, because the pages of other memory would lose their bytes
                if begin < end and any(low <= begin and end <= high for low, high in mappings):
                    libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), DONTNEED)
        trim()


def trim() -> None:
    """Let the allocator return what it does not use to the system. It would keep some of it for each thread."""
    with suppress(OSError, AttributeError, TypeError):  # because another C library may lack the function
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _file_mappings() -> list[tuple[int, int]]:
    """The address ranges of this process that map files"""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if fields[4] != "0" and len(fields) == 6 and fields[5].startswith("/"):  # an inode and a path
                low, high = fields[0].split("-")
                found.append((int(low, 16), int(high, 16)))
    return found
