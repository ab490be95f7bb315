"""Memory goes back to the system while a file is read, and no byte is lost."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbo_nb.machine.mapped import BATCH, PageReleaser, trim

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


def resident(kind: str) -> int:
    """Bytes of this process that are in memory: "RssFile" or "RssAnon"."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(kind))


def test_pages_of_a_file_are_dropped_and_read_again(tmp_path):
    values = torch.arange(1 << 24, dtype=torch.float32)
    save_file({"a": values}, tmp_path / "a.safetensors")
    mapped = load_file(tmp_path / "a.safetensors")["a"]
    total = mapped.sum()
    before, pages = resident("RssFile"), PageReleaser()
    pages.done(mapped.data_ptr(), mapped.nbytes)  # as large as a batch
    assert mapped.nbytes >= BATCH and before - resident("RssFile") > 0.9 * mapped.nbytes
    assert mapped.sum() == total


def test_other_memory_keeps_its_bytes():
    values, pages = torch.arange(1 << 22, dtype=torch.float32), PageReleaser()
    pages.done(values.data_ptr(), values.nbytes)
    pages.release()
    assert torch.equal(values, torch.arange(1 << 22, dtype=torch.float32))


def test_freed_memory_between_used_memory_goes_back():
    used = [bytes(100_000) for _ in range(500)][::100]  # too small for mappings of their own
    before = resident("RssAnon")
    trim()
    assert before - resident("RssAnon") > 10e6 and not any(map(any, used))


def test_nothing_to_release_is_fine():
    PageReleaser().release()
