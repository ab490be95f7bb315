"""Memory of the CPU that processes share, as `peers.Memory` describes it"""

import ctypes
import mmap
import os
import time

import torch


class SharedMemory:
    """A file without a name for each allocation, which goes with its process. A copy is done at once."""

    def __init__(self):
        self._maps, self._files = {}, {}

    def _map(self, number):
        memory = mmap.mmap(number, 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._maps[address] = memory
        return address

    def allocate(self, nbytes):
        number = os.memfd_create("turbo_nb_test")
        os.truncate(number, nbytes)
        address = self._map(number)
        self._files[address] = number
        return address, torch.frombuffer(self._maps[address], dtype=torch.uint8)

    def handle(self, address):
        return f"/proc/{os.getpid()}/fd/{self._files[address]}".encode()

    def map(self, handle):
        number = os.open(handle, os.O_RDWR)
        try:
            return self._map(number)
        finally:
            os.close(number)

    def free(self, address, own):
        self._maps.pop(address)
        if own:
            os.close(self._files.pop(address))

    def fork(self):
        pass

    def copy(self, rank, to, to_pitch, source, pitch, width, rows):
        if (
            width == 4
        ):  # a flag: in one store, because memmove may store it twice, the second time after a wait has ended
            ctypes.c_int32.from_address(to).value = ctypes.c_int32.from_address(source).value
            return
        for row in range(rows):
            ctypes.memmove(to + row * to_pitch, source + row * pitch, width)

    def join(self):
        pass

    def wait(self, flags):
        end = time.monotonic() + 20
        while not flags.all():
            assert time.monotonic() < end, f"flags {flags.tolist()} of {len(flags)} ranks"
            time.sleep(1e-4)
        flags.zero_()

    def synchronize(self):
        pass

    def give_up(self):
        pass
