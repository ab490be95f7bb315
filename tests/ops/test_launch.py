"""The guard of every launch: device, contiguity, and offsets above 2³¹ elements."""

import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import OnGpu

from turbo_nb.errors import InputError
from turbo_nb.ops import launch as module
from turbo_nb.ops.launch import aligned, channels_inside, launch

# One case a process, because a wrong address crashes it. `wide` tensors lie in memory that is reserved but never
# touched outside the few rows that a case writes.
CASES = {
    "block_means": """
        means = triton_sla.block_means(wide(x), 64)
        close(means, triton_sla.block_means(x, 64))
    """,
    "sums_of_runs": """
        sums = x.float().unflatten(1, (-1, 16)).sum(2)
        close(triton_sla.block_means(x, 64, wide(sums, 2**29)), triton_sla.block_means(x, 64, sums))
    """,
    "linear_state": """
        ours, exact = triton_sla.linear_state(wide(x), wide(x), weight), triton_sla.linear_state(x, x, weight)
        close(ours[0], exact[0])
        close(ours[1], exact[1])
    """,
    "sla": """
        args = weight, bias, 0.5, 128, 64
        close(triton_sla.sparse_linear_attention(wide(x), wide(x), wide(x), *args),
              triton_sla.sparse_linear_attention(x, x, x, *args))
    """,
    "sagesla": """
        args = weight, bias, 0.5, 128, 64
        close(triton_sage.sage_linear_attention(wide(x), wide(x), wide(x), *args),
              triton_sage.sage_linear_attention(x, x, x, *args))
    """,
    "cross_attention": """
        close(triton_cross.cross_attention(wide(x), wide(x), wide(x), 3), triton_cross.cross_attention(x, x, x, 3))
    """,
    "norm_rope": """
        y, angles = x.flatten(2), torch.rand(length, 32)
        tables = [wide(table[None, :, None])[0, :, 0] for table in (angles.cos(), angles.sin())]
        exact = triton_norms.rms_norm_rope(y, bias, angles.cos(), angles.sin(), 1)
        close(triton_norms.rms_norm_rope(y, bias, *tables, 1), exact)
    """,
    # the second clip of a batch, of which only the first rows are computed
    "gated_norm": """
        rows, width = 2**31 // 64 + 1, 64
        y, out = lazy(2, rows, width), lazy(2, rows, width)
        y[1, :8] = x[0, :8, 0]
        factor = torch.ones(2, width)
        triton_norms._gated_norm[(1, 2)](
            y, None, None, factor, factor, y, out, None, rows, width, 1e-6,
            BRANCH=False, GATE=False, NORM=True, QUANTIZE=False, ROWS=8, BLOCK=64,
        )
        exact = triton_norms.gated_norm(x[:, :8, 0], None, None, factor[:1], factor[:1])[1]
        close(out[1, :8], exact[0])
    """,
}
CHILD = """
import torch
from turbo_nb.ops.attention import triton_cross, triton_sage, triton_sla
from turbo_nb.ops.compare import relative_error
from turbo_nb.ops.norms import triton_norms

STRIDE = 2**25
length = 144  # rows: 144 · 2²⁵ elements are above 2³², so a wrapped offset would be inside the memory, too
x = torch.randn(1, length, 1, 64, generator=torch.Generator().manual_seed(0)).half()
if torch.cuda.is_available():  # the kernels themselves, in place of the interpreter
    torch.set_default_device("cuda")
    x = x.cuda()
weight, bias = torch.randn(64, 64), torch.randn(64)


def lazy(*shape, dtype=torch.float16):
    try:
        return torch.empty(*shape, dtype=dtype)
    except RuntimeError:  # the system reserves no memory that it may not have
        raise SystemExit(77)


def wide(y, stride=STRIDE):
    out = lazy(y.shape[1] * stride, dtype=y.dtype).as_strided(y.shape, (0, stride, 64, 1))
    return out.copy_(y)


def close(ours, exact):
    error = relative_error(ours, exact)
    assert error < 1e-3, error
"""


# A case may end its process, and a fork costs less than the imports. A process that has used CUDA cannot fork.
FORKS = """
import os

torch.set_num_threads(1)  # threads do not live through a fork
for name, code in CASES.items():
    if not (process := os.fork()):
        exec(code)
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def ended(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env=os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def ends() -> dict[str, tuple[int, str]]:
    """The exit code and the errors of each case"""
    pytest.importorskip("triton")
    cases = {name: textwrap.dedent(code) for name, code in CASES.items()}
    if torch.cuda.is_available():
        results = {name: ended(CHILD + code) for name, code in cases.items()}
        return {name: (result.returncode, result.stderr) for name, result in results.items()}
    result = ended(f"{CHILD}\nCASES = {cases!r}\n{FORKS}")
    codes = dict(line.split() for line in result.stdout.splitlines())
    assert codes.keys() == cases.keys(), result.stderr[-2000:]
    return {name: (int(code), result.stderr) for name, code in codes.items()}


@pytest.mark.parametrize("case", CASES)
def test_offsets_above_two_to_the_31(ends, case):
    code, errors = ends[case]
    if code == 77:
        pytest.skip("this system reserves no memory beyond what it has")
    assert code == 0, (code, errors[-2000:])


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that notes torch's current GPU at each launch; GPU 0 is the current one."""
    current, seen = [0], []

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(module, "_gpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)

    class Kernel:
        __name__ = "_kernel"

        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append((current[-1], grid, options))

    return SimpleNamespace(kernel=Kernel(), seen=seen)


def on(index):
    x = torch.zeros(4).as_subclass(OnGpu)
    x.index = index
    return x


def test_a_kernel_runs_on_the_gpu_of_its_tensors(kernel):
    launch(kernel.kernel, (3, 2), on(1), None, on(1), 5, 0.5, BLOCK=64)
    launch(kernel.kernel, (3,), 5, on(0))
    launch(kernel.kernel, (3,), torch.zeros(4))  # interpreted
    assert kernel.seen == [(1, (3, 2), {"BLOCK": 64}), (0, (3,), {}), (0, (3,), {})]


def test_tensors_of_two_devices_are_refused(kernel):
    descriptor = SimpleNamespace(base=on(1))
    for arguments in ((on(0), on(1)), (on(0), torch.zeros(4)), (on(0), descriptor)):
        with pytest.raises(InputError, match=r"_kernel are on devices \[(0, 1|-1, 0)\]. Expected one device. Move"):
            launch(kernel.kernel, (1,), *arguments)
    assert kernel.seen == []


def test_more_rows_or_heads_than_a_launch_takes_are_refused(kernel):
    with pytest.raises(InputError, match=rf"2,147,483,648 rows. Expected at most {module.MAX_ROWS:,}"):
        aligned(torch.zeros(64).expand(2**31, 64))
    with pytest.raises(InputError, match=r"70,000 heads or clips at once. Expected at most 65,535"):
        launch(kernel.kernel, (1, 70_000), on(0))


def test_views_are_copied_only_where_a_kernel_cannot_read_them():
    x = torch.randn(2, 5, 3, 64)
    qkv = torch.randn(2, 5, 3 * 64)
    assert channels_inside(x) is x and aligned(x) is x
    view = qkv[..., 64:128]
    assert channels_inside(view) is view and aligned(view) is view
    turned = x.transpose(2, 3)
    assert channels_inside(turned).is_contiguous() and torch.equal(aligned(turned), turned)
    odd = torch.randn(5, 65)[:, 1:]  # rows begin at multiples of 4 bytes
    assert channels_inside(odd) is odd
    assert torch.equal(aligned(odd), odd) and aligned(odd).is_contiguous() and aligned(odd).data_ptr() % 16 == 0
