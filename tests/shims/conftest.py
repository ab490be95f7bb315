import pytest

from turbo_nb import shims

# Modules with upstream's names and, of its code, what the stand-ins meet there: nothing of it is copied
CHECKOUT = {
    "rcm/__init__.py": "",
    "rcm/networks/__init__.py": "",
    "rcm/networks/wan2pt1.py": """
import torch
from flash_attn.layers.rotary import apply_rotary_emb
class WanModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.attn = torch.nn.Linear(4, 4), torch.nn.Module()
        self.attn.local_attn = torch.nn.Module()
        self.attn.local_attn.proj_l = torch.nn.Linear(2, 2)
""",
    "rcm/utils/__init__.py": "",
    "rcm/utils/umt5.py": "import torch\ndef encoder(device=torch.cuda.current_device()): return device\n",
    "rcm/utils/attention.py": "def _get_sdpa_config(device, is_half): raise NotImplementedError\n",
    "ops/__init__.py": "from .core import layernorm, rmsnorm\n",
    "ops/core.py": """
from turbo_diffusion_ops import gemm_cuda, quant_cuda
def rmsnorm(x, w, eps): raise NotImplementedError
def layernorm(x, w, b, eps, elementwise_affine=True): raise NotImplementedError
""",
    "SLA/__init__.py": "from .core import SageSparseLinearAttention\n",
    "SLA/core.py": """
try:
    import spas_sage_attn._qattn as qattn
    import spas_sage_attn._fused as fused
    from spas_sage_attn.utils import get_vanilla_qk_quant, block_map_lut_triton
except ImportError:
    qattn = None
def get_block_map(q, k, topk_ratio, BLKQ=64, BLKK=64):
    return "upstream's", int(topk_ratio * -(-k.shape[-2] // BLKK))
def get_cuda_arch(device): raise NotImplementedError
class _attention: pass
class SageSparseLinearAttention:
    def __init__(self, head_dim, topk): self.topk = topk
""",
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder on sys.path that has upstream's modules, and the stand-ins taken out in the end"""
    folder = tmp_path / "turbodiffusion"
    for name, text in CHECKOUT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    yield folder
    shims.uninstall()
