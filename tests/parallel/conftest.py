import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that other ranks find `targets`, in every import mode of pytest

GPUS = torch.cuda.device_count() > 1
DEVICE = "cuda:0" if GPUS else "cpu"
MOST = min(3, torch.cuda.device_count()) if GPUS else 3  # ranks


@pytest.fixture(autouse=True, scope="package")
def ranks_on_the_cpu():
    """Without two GPUs the ranks share the CPU"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the other ranks
        if not GPUS:
            patch.setenv("TURBO_NB_RANKS", "cpu")
        yield
