"""The benchmarks at small shapes on a CPU: rows, and the check that stands before each."""

import csv
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import __main__ as command
from benchmarks import e2e, experts, harness, kernels, lora, memory, startup, step, switch, vae
from turbo_nb import generation
from turbo_nb.catalog import NANO
from turbo_nb.errors import InputError, TurboNbError
from turbo_nb.ops.attention import reference as attention_reference
from turbo_nb.ops.norms import reference as norms_reference
from turbo_nb.parallel.group import Group
from turbo_nb.video import mp4

ROOT = Path(__file__).parents[1]
QUICK = ("--device", "cpu", "--runs", "1", "--warmup", "0")
TINY = ("step", "--model", "tiny", "--size", "128x128x9", "--check-size", "128x128x9", "--topk", "0.4", *QUICK)
ROPE = ("kernels", "--only", "apply_rotary_emb", "--shape", "63x2x64", *QUICK)
CHOOSE = attention_reference.block_map
LINEAR = ("kernels", "--only", "int8_linear", "--shape", "63x200x130", *QUICK)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """bench(*arguments): exit code, and the rows in the file afterwards"""

    def run(*arguments):
        path = tmp_path / "speed.csv"
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments), "--csv", str(path)])
        with pytest.raises(SystemExit) as ended:
            command.main()
        return ended.value.code, harness.read(path) if path.exists() else []

    return run


def test_a_step_is_a_row_with_its_check(bench, monkeypatch):
    monkeypatch.setenv("TURBO_NB_COMMIT", "c0ffee")
    code, (row,) = bench(*TINY)
    assert code == 0 and list(row) == harness.COLUMNS
    assert row["work"] == "step of tiny, 2 of 2 layers, sla 0.4, bf16 linears"
    assert (row["shape"], row["mode"], row["weights"], row["n"]) == ("128x128x9", "eager", "random", "1")
    assert row["gpu"].startswith("CPU with") and row["torch"] == torch.__version__ and row["commit"] == "c0ffee"
    assert (row["driver"], row["peak_gib"]) == ("", "") and "same block maps, 2 layers, 128x128x9" in row["check"]
    assert 0 < float(row["error"]) < float(row["limit"]) and float(row["ms"]) > 0 and float(row["first_ms"]) > 0


def test_a_step_on_two_gpus_is_a_row_beside_one_gpu_and_where_it_goes(bench, monkeypatch, capsys):
    monkeypatch.setenv("TURBO_NB_RANKS", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code, rows = bench(*TINY, "--gpus", 2)
    assert code == 0 and [(row["gpus"], row["mode"]) for row in rows] == [
        ("1", "fused, graph"), ("2", "fused, graph"),
        ("2", "fused, graph, only compute"), ("2", "fused, graph, only exchange"),
    ]  # fmt: skip
    assert all(float(row["error"]) < 1e-5 and "same block maps" in row["check"] for row in rows)
    assert "2 GPUs: " in capsys.readouterr().out and "2 × CPU" in harness.table(rows)


def test_an_expert_per_gpu_is_two_rows_beside_both_on_one_and_on_each(bench, monkeypatch, capsys):
    monkeypatch.setenv("TURBO_NB_RANKS", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = (*TINY, "--model", "tiny-i2v", "--gpus", 2, "--experts")
    code, rows = bench(*options)
    both = [("1", "fused, graph"), ("2", "fused, graph")]
    assert code == 0 and [(row["gpus"], row["mode"]) for row in rows] == [
        *both, ("2", experts.MODES[experts.ONE_CLIP]), ("2", experts.MODES[experts.MORE_CLIPS]),
    ]  # fmt: skip
    assert {row["work"] for row in rows} == {"4 steps of tiny-i2v, 2 of 2 layers, sla 0.4, bf16 linears"}
    assert all(float(row["error"]) < 1e-5 and float(row["first_ms"]) > 0 for row in rows)

    gather = Group.gather

    def mirrored(self, x, counts, everywhere=False):  # what rank 0 sends to the low-noise expert
        return gather(self, x.flip(-1) if everywhere else x, counts, everywhere)

    monkeypatch.setattr(Group, "gather", mirrored)
    code, more = bench(*options)
    assert code == 1 and [(row["gpus"], row["mode"]) for row in more[len(rows) :]] == both
    assert capsys.readouterr().out.count("FAILED 4 steps of tiny-i2v") == 2


def test_the_experts_of_a14b_have_two_steps_each():
    setup = step.Setup(
        model="tiny-i2v", layers=1, size=(128, 128, 5), attention="sla", topk=0.4, linears="bf16", device="cpu"
    )
    both = experts.Experts(setup, None, 1, "cpu")
    assert both.steps == ([0, 1], [2, 3]) and list(both.experts) == [1, 0]
    weights = [both.experts[number].model.proj_out.weight for number in range(2)]
    assert not torch.equal(*weights) and not torch.equal(*both.starts[:2])


def test_a_vae_on_two_gpus_is_rows_of_decoding_and_of_encoding_beside_one_gpu(bench, monkeypatch):
    monkeypatch.setenv("TURBO_NB_RANKS", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code, rows = bench("vae", "--size", "32x48x5", "--base-dim", 8, "--gpus", 2, *QUICK)
    assert code == 0 and [(row["work"], row["gpus"]) for row in rows] == [
        (f"vae {work}, base_dim 8", gpus) for work in ("decode", "encode") for gpus in ("1", "2")
    ]
    assert all(float(row["error"]) < 1e-5 and "the worst row's error" in row["check"] for row in rows)


@pytest.mark.parametrize(
    ("options", "work", "kept"),
    [
        (("--attention", "original", "--linears", "int8"), "1 of 2 layers, original, int8", "dense"),
        (("--attention", "sagesla"), "1 of 2 layers, sagesla 0.4, bf16", "same block maps"),
        (("--topk", "1"), "1 of 2 layers, sla 1, bf16", "every block kept"),
    ],
)
def test_other_attention_and_linears(bench, monkeypatch, options, work, kept):
    monkeypatch.setenv("TURBO_NB_ATTENTION", "reference" if "sagesla" in options else "auto")
    code, (row,) = bench(*TINY, "--layers", 1, *options)
    assert code == 0 and work in row["work"] and kept in row["check"]


def test_compiled_blocks_take_the_same_maps(bench, monkeypatch):
    monkeypatch.setattr(step, "COMPILE", {"fullgraph": True, "backend": "eager"})
    code, (row,) = bench(*TINY, "--mode", "compile")
    assert (code, row["mode"]) == (0, "compile") and "same block maps" in row["check"]


@contextmanager
def shifted(transformer):
    """A mode that is wrong by a few percent"""
    with torch.no_grad():
        transformer.proj_out.weight.mul_(1.03)
    yield


@contextmanager
def own_maps(transformer):
    """A mode that is right, and chooses its blocks where nobody can see it"""
    for block in transformer.blocks:
        layer = block.attn1.processor.sla

        def forward(q, k, v, sums, layer=layer):
            kept = CHOOSE(q, k, layer.topk, layer.block_q, layer.block_k)
            sparse = attention_reference.sparse_attention(q, k, v, kept, layer.block_q, layer.block_k)
            linear = layer.proj_l(attention_reference.linear_attention(q, k, v).float())
            return (sparse + linear).to(q.dtype)

        layer.forward = forward
    yield


def test_a_wrong_mode_gives_no_row_and_leaves_the_others_theirs(bench, monkeypatch, capsys):
    monkeypatch.setitem(step.MODES, "shifted", shifted)
    monkeypatch.setitem(step.MODES, "broken", lambda transformer: transformer.no_such_thing)
    code, rows = bench(*TINY, "--layers", 1, "--mode", "shifted,broken,eager")
    out = capsys.readouterr().out
    assert code == 1 and [row["mode"] for row in rows] == ["eager"]
    assert "128x128x9, shifted: rel. L2" in out and "broken: AttributeError" in out


def test_a_mode_with_maps_of_its_own_is_checked_with_every_block(bench, monkeypatch):
    monkeypatch.setitem(step.MODES, "own", own_maps)
    code, (row,) = bench(*TINY, "--mode", "own")
    assert code == 0 and "every block kept" in row["check"]


def test_the_fused_mode_fuses_for_the_time_and_for_the_check(bench, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(step.fused_transformer, "fuse", lambda t: calls.append("fuse") or "3 modules replaced")
    monkeypatch.setattr(step.fused_transformer, "unfuse", lambda t: calls.append("unfuse"))
    assert bench(*TINY, "--layers", 1, "--mode", "fused+eager")[0] == 0
    assert calls == ["fuse", "unfuse"] * 2 and "3 modules replaced" in capsys.readouterr().out


def test_block_maps_are_one_a_layer_and_the_reference_is_itself_again():
    setup = step.Setup(
        model="tiny", layers=2, size=(128, 128, 9), attention="sla", topk=0.4, linears="bf16", device="cpu"
    )
    plain = step.Plain(setup)
    assert [tuple(kept.shape) for kept in plain.maps] == [(1, 2, 2, 3)] * 2 and attention_reference.block_map is CHOOSE
    assert all(kept.sum(-1).eq(1).all() for kept in plain.maps)  # int(0.4 · 3)
    parts = dict(step.build(setup).named_parameters())
    assert all(part.float().std() > 0 for part in parts.values())
    norms = [part for name, part in parts.items() if "norm" in name and name.endswith("weight")]
    assert all(0.9 < norm.mean() < 1.1 for norm in norms) and 0.1 < plain.ref.std() < 10


def test_kernels_are_rows(bench):
    code, rows = bench("kernels", *QUICK, "--shape", "129x2x64")
    assert code == 0 and {row["work"] for row in rows} == kernels.OPERATIONS.keys()
    assert {row["shape"] for row in rows} == {"129x2x64 bfloat16"} and rows[0]["mode"] == "reference"
    assert {"chosen", "sdpa"} <= {row["mode"] for row in rows}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("slightly", lambda *arguments: 1.02 * norms_reference.apply_rotary_emb(*arguments)),
        ("NaN", lambda *arguments: torch.full_like(arguments[0], torch.nan)),
        ("cut", lambda *arguments: norms_reference.apply_rotary_emb(*arguments)[:, 1:]),
    ],
)
def test_a_wrong_kernel_gives_no_row(bench, monkeypatch, capsys, name, wrong):
    monkeypatch.setitem(kernels.OPERATIONS["apply_rotary_emb"].spellings, name, wrong)
    code, rows = bench(*ROPE)
    assert code == 1 and [row["mode"] for row in rows] == ["reference", "chosen"]
    assert f"FAILED apply_rotary_emb, 63x2x64 bfloat16, {name}: rel. L2" in capsys.readouterr().out


@pytest.mark.parametrize("length", [63, 129, 700, 1000, 1536])
def test_the_blocks_to_keep_are_beyond_doubt(length):
    inputs = kernels.block_map_inputs((length, 3, 128), "cpu", torch.bfloat16)
    kept = attention_reference.block_map(*inputs)
    exact = attention_reference.block_map(inputs[0].double(), inputs[1].double(), *inputs[2:])
    assert torch.equal(kept, exact)
    if length >= 700:
        assert len(kept.flatten(0, 2).unique(dim=0)) > 3  # and not the same everywhere


def test_a_vae_is_a_row_and_a_wrong_one_is_not(bench, monkeypatch, capsys):
    monkeypatch.setitem(vae.MODES, "wrong", lambda module: module.decoder.conv_in.weight.mul_(1.2))
    options = ("--vae", NANO.folder / "vae", "--size", "16x16x1", "--check-size", "16x16x1")
    code, rows = bench("vae", *options, "--mode", "eager,wrong,channels_last,fused", *QUICK)
    assert code == 1 and [row["mode"] for row in rows] == ["eager", "channels_last", "fused"]
    assert (
        rows[0]["check"].startswith("PSNR ")
        and "inf against plain bf16" in rows[0]["check"]
        and "wrong: rel. L2" in capsys.readouterr().out
    )
    code, rows = bench("vae", "--base-dim", 8, *options[2:], *QUICK)
    assert code == 0 and rows[-1]["weights"] == "random"
    code, rows = bench("vae", "--encode", "--base-dim", 8, *options[2:], "--mode", "eager,fused", *QUICK)
    assert code == 0 and [row["work"] for row in rows[-2:]] == ["vae encode, base_dim 8, bf16"] * 2


def test_a_switch_of_experts_is_a_row_a_mode(bench, monkeypatch):
    monkeypatch.setattr(switch, "STEP", 0)
    options = ("switch", "--gb", 0.01, "--device", "cpu", "--runs", 2)
    code, rows = bench(*options)
    assert code == 0 and [row["mode"] for row in rows] == ["accelerate", "turns", "ahead"]
    assert {(row["work"], row["shape"], row["error"]) for row in rows} == {("switch of experts, int8", "0.0 GB", "0")}
    monkeypatch.setattr(switch.Expert, "forward", lambda self: torch.rand(1))  # a wrong one came
    assert bench(*options) == (1, rows)


LORA = ("lora", "--model", "tiny", "--size", "128x128x9", "--check-size", "128x128x9", "--rank", "4", *QUICK)


@pytest.mark.parametrize("linears", ["bf16", "int8"])
def test_a_lora_is_a_row_for_its_step_and_for_a_change_of_its_strength(bench, monkeypatch, linears):
    code, rows = bench(*LORA, "--linears", linears)
    assert code == 0 and [row["mode"] for row in rows] == ["base", "merge", "merge", "branch", "branch"]
    assert [row["work"].startswith("change of strength") for row in rows] == [False, False, True, False, True]
    assert {row["work"].rpartition(", ")[2] for row in rows} == {"LoRA of rank 4"}
    monkeypatch.setattr(lora.LoadedLoRA, "set_strength", lambda self, strength: None)  # a change that changes nothing
    code, more = bench(*LORA, "--linears", linears, "--mode", "merge")
    assert code == 1 and [row["work"] for row in more[len(rows) :]] == [rows[1]["work"]]


E2E = ("e2e", "--size", "64x64x5", "--steps", 2, "--device", "cpu", "--runs", 3, "--warmup", 0)


@pytest.mark.parametrize(("options", "weights"), [((), "nano"), (("--random", "tiny"), "random tiny")])
def test_a_clip_is_a_row_a_stage(bench, monkeypatch, options, weights):
    taken, add = [], mp4.Encoder.add
    monkeypatch.setattr(mp4.Encoder, "add", lambda self, frames: taken.append(len(frames)) or add(self, frames))
    code, rows = bench(*E2E, *options)
    assert code == 0 and taken == [1, 4] * 4  # the first run and three more; decoded frames are encoded
    assert [row["work"].split()[0] for row in rows] == ["text", "denoise", "decode", "step", "write", "all"]
    assert {(row["weights"], row["shape"], row["n"]) for row in rows} == {(weights, "64x64x5", "3")}
    text, denoise, decode, one, write, whole = (float(row["ms"]) for row in rows)
    least = [float(row["ms_min"]) for row in rows]
    assert text > 0.2 and denoise > 2 * least[3] > 0  # a warm run encodes its prompt as well
    assert max(denoise, decode, one, write) < whole and sum(least[:3]) + least[4] <= whole
    spread, size = re.search(r"deviation (.*), 2 is flat; an mp4 of (.*) kB", rows[0]["check"]).groups()
    assert 10 < float(spread) < 120 and 1 < float(size) < 20


def test_a_clip_in_so_much_memory_goes_by_a_plan(bench):
    quick = (*E2E[:-4], "--runs", 1, "--warmup", 0, "--random", "tiny")
    for gigabytes, plan in ((1, "resident"), (0.01, "free-text")):
        code, rows = bench(*quick, "--memory", gigabytes)
        assert code == 0 and rows[-1]["mode"] == f"plan {plan} in {gigabytes} GB"


def test_a_gpu_can_be_made_to_look_smaller(monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=80e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *told: shares.append(told))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5e9)
    with e2e.gpu_of(20e9, "cuda"):
        assert torch.cuda.mem_get_info("cuda") == (15e9, 20e9)
    assert shares == [(0.25, 0), (1.0, 0)]


MEMORY = ("memory", "--size", "64x64x5", "--steps", 2, "--attention", "sla", "--device", "cpu")


@pytest.mark.parametrize("model", ["tiny", "tiny-i2v"])
def test_memory_plans_are_rows_and_one_that_fails_stops_no_other(bench, model, monkeypatch, capsys):
    load = memory.load_as_on_a_gpu

    def fails(*arguments):
        if arguments[-1] == 2e6:
            raise torch.OutOfMemoryError("full")
        return load(*arguments)

    monkeypatch.setattr(memory, "load_as_on_a_gpu", fails)
    code, rows = bench(*MEMORY, "--model", model, "--gb", "0.0005,0.002,0.004")
    plans = ["plan group, 0 of 2 blocks", "plan group, 2 of 2 blocks"]
    assert [row["mode"] for row in rows[::4]] == [
        f"{plan} in {gb} GB" for plan, gb in zip(plans, (0.0005, 0.004), strict=True)
    ]
    assert [row["work"].split()[0] for row in rows[:4]] == ["all", "text", "denoise", "decode"]
    assert code == 1 and {row["weights"] for row in rows} == {f"random {model}"}
    table = capsys.readouterr().out.splitlines()[-5:]
    assert table[0].startswith("| model, clip | GB | plan |") and table[1] == "|---" * 13 + "|"
    assert [line.endswith("| passed |") for line in table[2:]] == [True, False, True]
    assert "0.002 | FAILED: OutOfMemoryError: full" in table[3]


def test_a_plan_that_runs_out_of_memory_gives_no_row(bench, monkeypatch, capsys):
    make, failures = generation.decode, [torch.OutOfMemoryError("full")]
    monkeypatch.setattr(
        generation, "decode", lambda *args: make(*args) if not failures else (_ for _ in ()).throw(failures.pop())
    )
    assert bench(*MEMORY, "--model", "tiny", "--gb", "1") == (1, [])
    assert "memory ran out on the way" in capsys.readouterr().out


def test_random_waves_are_smooth_and_pictures_of_them_varied(bench):
    found = e2e.smooth(torch.empty(1, 16, 21, 60, 104))
    assert found.shape == (1, 16, 21, 60, 104) and 0.3 < found.std() < 1.2
    assert all(found.diff(dim=dim).std() < found.std() / 2 for dim in (2, 3, 4))
    vae = e2e.random_vae(8, "cpu")
    e2e.spread_out(vae)
    frames = e2e.decode(vae, e2e.smooth(torch.empty(1, 16, 3, 16, 16)))
    assert 0.1 < frames.std() < 0.8 and all(frames.diff(dim=dim).std() < frames.std() for dim in (2, 3, 4))


def test_a_flat_picture_gives_no_row(bench, monkeypatch):
    monkeypatch.setattr(e2e, "FLAT", 200)
    assert bench("e2e", "--size", "64x64x1", "--steps", 1, "--device", "cpu", "--runs", 1) == (1, [])


def test_rows_are_added_and_another_header_is_refused_before_any_work(bench, tmp_path, capsys, monkeypatch):
    assert len(bench(*LINEAR)[1]) == 2
    code, rows = bench(*LINEAR)
    assert code == 0 and len(rows) == 4 and len((tmp_path / "speed.csv").read_text().splitlines()) == 5
    path = tmp_path / "speed.csv"
    text = path.read_text()
    path.write_text(text.replace("first_ms", "cold_ms"))
    monkeypatch.setattr(harness, "facts", None)
    monkeypatch.setattr(harness, "read", lambda path, read=harness.read: read(path) and None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *LINEAR, "--csv", str(path)])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "has the columns date,gpu" in capsys.readouterr().err and "cold_ms" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*TINY, "--experts"), "gpus is 1. Expected 2, one for each expert."),
        ((*TINY, "--mode", "fast"), "mode is 'fast'. Expected one of reference, eager, fused, compile"),
        ((*TINY, "--linears", "int4"), "linears is 'int4'"),
        ((*TINY, "--topk", "2"), "sla_topk is 2"),
        ((*TINY, "--size", "832x480"), "size is '832x480'"),
        ((*TINY, "--size", "832x480x80"), "4n + 1 frames"),
        ((*ROPE, "--only", "softmax"), "operation is 'softmax'"),
        ((*ROPE, "--dtype", "int8"), "dtype is 'int8'"),
        (("vae", "--mode", "fast", *QUICK), "mode is 'fast'"),
        (("e2e", "--linears", "int4"), "linears is 'int4'"),
        (("switch", "--mode", "eager"), "mode is 'eager'. Expected one of accelerate, turns, ahead"),
        (("switch", "--gb", "0"), "gb is 0. Expected the size of an expert in GB, above 0"),
        (("lora", "--mode", "eager"), "mode is 'eager'. Expected one of base, merge, branch"),
        (("lora", "--model", "2B"), "model is '2B'"),
        (("e2e", "--memory", "-1"), "memory is -1. Expected GB, above 0"),
        (("memory", "--model", "1.3B,2B"), "model is '2B'. Expected one of 1.3B, 14B"),
        (("memory", "--gb", "10,x"), "gb is '10,x'. Expected GB above 0"),
        (("memory", "--linears", "int4"), "linears is 'int4'"),
        (("e2e", "--random", "2B"), "random is '2B'. Expected one of 1.3B, 14B, nano, tiny"),
    ],
)
def test_what_cannot_be_used_is_said(bench, capsys, arguments, words):
    assert bench(*arguments) == (2, []) and words in capsys.readouterr().err


def test_the_table_has_the_latest_row_of_each(bench, monkeypatch, capsys, tmp_path):
    bench(*LINEAR)
    path = tmp_path / "speed.csv"
    with path.open() as file:
        first, second = csv.DictReader(file)
    lines = harness.table([first | {"ms": "7"}, second, first | {"ms": "9"}]).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {10}
    assert lines[2].startswith("| int8_linear, random weights | 63x200x130 bfloat16 | reference | 9 (")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["benchmarks", "table", str(path)])
    with pytest.raises(SystemExit, match="0"):
        command.main()
    assert capsys.readouterr().out.count("\n") == 4
    with pytest.raises(InputError, match="does not exist"):
        harness.read(tmp_path / "none.csv")


def test_calls_are_counted_and_the_median_is_of_the_timed_ones(monkeypatch):
    clock = iter([0, 100, 0, 50, 0, 3, 0, 1, 0, 8])  # seconds: the first, a warm-up, three that count
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    timing = harness.measure(lambda: None, "cpu", runs=3, warmup=1)
    assert timing == harness.Timing(ms=3000, ms_min=1000, n=3, first_ms=100_000, peak_gib=None)


def test_the_commit_is_the_checkouts_or_unknown(monkeypatch, tmp_path):
    monkeypatch.delenv("TURBO_NB_COMMIT", raising=False)
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "harness.py"))
    assert harness.commit() == "unknown"


def test_help_needs_no_torch():
    code = "import sys, benchmarks.__main__; assert not {'torch', 'diffusers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


BESIDE = "beside it, import torch and WanPipeline", "beside it, read the files"


def test_a_start_is_a_row_a_phase(bench, monkeypatch, tmp_path):
    clip = ("--model", "nano", "--prompt", "a large red circle", "--resolution", "64x64", "--num_frames", 5)
    monkeypatch.setattr(startup, "BARE", "import time; time.sleep(0.25)")
    code, rows = bench("startup", "--device", "cpu", "--runs", 1, *clip, "--num_steps", 1)
    assert code == 0 and {row["mode"] for row in rows} == {"cold", "warm"}
    warm = {row["work"]: float(row["ms"]) for row in rows if row["mode"] == "warm"}
    whole, bare, read = (warm.pop(work) for work in ("startup, all", *BESIDE))
    assert 250 <= bare < whole and read == 0  # nano's files are not among the arguments
    assert list(warm)[:3] == ["startup, start Python", "startup, import", "startup, resolve"]
    assert warm["startup, clip"] > 0 and sum(warm.values()) == pytest.approx(whole, rel=0.01)
    assert {row["shape"] for row in rows} == {"64x64x5"} and rows[0]["error"] == "0"


def test_a_start_that_fails_is_an_error():
    with pytest.raises(TurboNbError, match="failed with code 2"):
        list(startup.jobs(["--prompt", ""], "cpu", ["warm"], 1))
    with pytest.raises(InputError, match="mode is 'hot'"):
        list(startup.jobs([], "cpu", ["hot"], 1))
