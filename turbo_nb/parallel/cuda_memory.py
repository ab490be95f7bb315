"""Memory of a GPU that other processes map, through CUDA's driver: allocations, handles and copies between GPUs."""

import ctypes
from functools import cache

import torch
from torch import Tensor

OUT_OF_MEMORY = 2
UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the driver knows the GPU from the address
LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """CUipcMemHandle"""

    _fields_ = (("reserved", ctypes.c_char * 64),)


def _side(name: str) -> list[tuple[str, type]]:
    return [
        (f"{name}XInBytes", ctypes.c_size_t), (f"{name}Y", ctypes.c_size_t), (f"{name}MemoryType", ctypes.c_uint),
        (f"{name}Host", ctypes.c_void_p), (f"{name}Device", ctypes.c_uint64), (f"{name}Array", ctypes.c_void_p),
        (f"{name}Pitch", ctypes.c_size_t),
    ]  # fmt: skip


class _Copy(ctypes.Structure):
    """CUDA_MEMCPY2D"""

    _fields_ = (*_side("src"), *_side("dst"), ("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t))


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments) -> int:
    """Call the driver. Raise where it fails, except for a lack of memory"""
    code = getattr(_driver(), name)(*arguments)
    if code not in (0, OUT_OF_MEMORY):
        raise RuntimeError(f"{name} failed with error {code} of CUDA's driver")
    return code


class _Bytes:
    """An address, in the form that torch takes without a copy"""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


class CudaMemory:
    """The memory of one GPU, as `peers.Memory` describes it.

    Args:
        device: the GPU.
        size: the number of ranks. Each has a stream for the copies to it.
    """

    def __init__(self, device: torch.device, size: int):
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(size)]
        self._given_up = torch.zeros(1, dtype=torch.int32).pin_memory()  # so that nothing has to run to set it

    def allocate(self, nbytes: int) -> tuple[int, Tensor]:
        """As in `Memory`. Not from torch's cache, whose parts cannot be mapped alone."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("memory of several GPUs cannot grow while a CUDA graph is recorded")
        address = ctypes.c_uint64()
        if _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes)):
            torch.cuda.empty_cache()
            if _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes)):
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory: {nbytes / 2**30:.2f} GiB for the exchange between GPUs"
                )
        return address.value, torch.as_tensor(_Bytes(address.value, nbytes), device=self._device)

    def handle(self, address: int) -> bytes:
        """As in `Memory`."""
        handle = _Handle()
        _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def map(self, handle: bytes) -> int:
        """As in `Memory`."""
        address = ctypes.c_uint64()
        _call(
            "cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle),
            ctypes.c_uint(LAZY_PEER_ACCESS),
        )  # fmt: skip
        return address.value

    def free(self, address: int, own: bool) -> None:
        """As in `Memory`."""
        with torch.cuda.device(self._device):  # because any thread may call it
            _call("cuMemFree_v2" if own else "cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def fork(self) -> None:
        """As in `Memory`."""
        begun = torch.cuda.current_stream(self._device).record_event()
        for stream in self._streams:
            stream.wait_event(begun)

    def copy(self, rank: int, to: int, to_pitch: int, source: int, pitch: int, width: int, rows: int) -> None:
        """As in `Memory`."""
        copy = _Copy(
            srcMemoryType=UNIFIED, srcDevice=source, srcPitch=pitch, dstMemoryType=UNIFIED, dstDevice=to,
            dstPitch=to_pitch, WidthInBytes=width, Height=rows,
        )  # fmt: skip
        stream = ctypes.c_void_p(self._streams[rank].cuda_stream)
        _call("cuMemcpy2DAsync_v2", ctypes.byref(copy), stream)

    def join(self) -> None:
        """As in `Memory`."""
        current = torch.cuda.current_stream(self._device)
        for stream in self._streams:
            current.wait_stream(stream)

    def wait(self, flags: Tensor) -> None:
        """As in `Memory`."""
        from ..ops.triton_flags import wait

        wait(flags, self._given_up)

    def synchronize(self) -> None:
        """As in `Memory`."""
        torch.cuda.synchronize(self._device)

    def give_up(self) -> None:
        """As in `Memory`."""
        self._given_up.fill_(1)
