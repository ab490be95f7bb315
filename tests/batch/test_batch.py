"""A batch: prompts are read and checked, each video is made once, and a run can be stopped at any moment."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest

from turbo_nb import batch, catalog, generation, pipeline, records, settings, sla
from turbo_nb.batch import actor, jobs, manifest, notebook, prompts, runner
from turbo_nb.batch.summary import SHEET
from turbo_nb.errors import InputError, OutputError, TurboNbError, TurboNbWarning
from turbo_nb.files import fingerprint, hub, resolve
from turbo_nb.machine import atomic, environment, probe
from turbo_nb.pipeline import LoadedModel
from turbo_nb.video import images, mp4, sheet

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "05_batch.ipynb"
PROMPTS = ["a red circle", "a blue square", "a green triangle"]


def run(nano, folder, jobs=PROMPTS, **settings):
    return runner.run(jobs, nano, folder, **{"num_frames": 1} | settings)


def videos(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.mp4")}


# Prompts


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_line_keeps_measurements_beside_the_settings(tmp_path):
    asked, path = settings.ClipSettings(prompt="x"), tmp_path / "x.mp4"
    path.write_bytes(b"12")
    task = jobs.Task(
        id="1", settings=asked, clip=settings.resolve_clip(asked, catalog.find("nano")), source="", path=path
    )
    measured = {"timings": {"text": 1.0}, "steps": [0.5], "peaks": {"text": 9.0}, "machine": "H100", "cost": 0.1}
    made = records.VideoRecord(prompt="x", **measured)
    line = task.done(replace(made, job="1"), write=2.0)
    assert line.settings == records.VideoRecord(prompt="x") and (line.steps, line.peaks) == ([0.5], {"text": 9.0})
    assert (line.timings, line.bytes) == ({"text": 1.0, "write": 2.0}, 2)


def test_a_text_file_is_a_prompt_a_line(tmp_path):
    path = write(tmp_path / "p.txt", "\ufeff# first\n\n  a red circle \n#x\nsize #4, a\u2028b\x0cc\n一个红色的圆")
    assert [(job.prompt, job.source, job.settings) for job in prompts.read_prompts(path)] == [
        ("a red circle", f"{path}:3", {}),
        ("size #4, a\u2028b\x0cc", f"{path}:5", {}),
        ("一个红色的圆", f"{path}:6", {}),
    ]


def test_rows_set_what_is_theirs(tmp_path):
    table = (
        'Prompt,seed,num-frames,sigma_max,ode,image\r\n"red, and\nround",3,,1e2,yes,a.png\r\n,,\r\nblue,,5,,false,\r\n'
    )
    lines = (
        '{"prompt": "red, and\\nround", "seed": 3, "num_frames": null, "sigma_max": 100, '
        '"ode": true, "image": "a.png"}\n'
        '\n{"num-frames": "5", "ode": false, "prompt": "blue"}'
    )
    for name, text, second in [("p.csv", table, 5), ("p.jsonl", lines, 3)]:
        jobs = prompts.read_prompts(write(tmp_path / name, text))
        assert [job.prompt for job in jobs] == ["red, and\nround", "blue"]
        first = {"seed": 3, "sigma_max": 100.0, "ode": True, "image": str(tmp_path / "a.png")}
        assert [job.settings for job in jobs] == [first, {"num_frames": 5, "ode": False}]
        assert jobs[1].source == f"{tmp_path / name}:{second}"


@pytest.mark.parametrize("name", settings.PICTURES)
def test_a_rows_image_may_be_in_the_home_and_an_address_stays_whole(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "p.jsonl").write_text(
        "".join(f'{{"prompt": "red", "{name}": "{image}"}}\n' for image in ("~/a.png", "https://b.org/c.png", "d.png"))
    )
    found = [job.settings[name] for job in prompts.read_prompts(tmp_path / "p.jsonl")]
    assert found == ["/home/me/a.png", "https://b.org/c.png", str(tmp_path / "d.png")]


def test_rows_may_set_all_that_generate_takes():
    # extend_clip is left out, because an id would have to know the content of the mp4
    taken = signature(generation.generate).parameters.keys() - {"pipeline", "prompt", "extend_clip"}
    assert {name for name in taken if not name.startswith("on_")} == prompts.ROW_OPTIONS.keys()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.md", "x", "Expected a .txt, .csv or .jsonl"),
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.csv", "", "p.csv:1: the header row"),
        ("p.csv", "text,seed\nred,1\n", "p.csv:1: .* with prompt in them"),
        ("p.csv", "prompt,seed,seed\nred,1,1\n", "p.csv:1: the header row names seed twice"),
        ("p.csv", "prompt,seed\nred,1\nred, and round,1\n", "p.csv:3: the row has 3 cells. Expected 2"),
        ("p.csv", 'prompt,seed\n"a\nb",1\nred,x\n', "p.csv:4: seed is 'x'. Expected a whole number"),
        ("p.csv", "prompt,sed\nred,1\n", "p.csv:1: a column is 'sed'. Expected one of adaptive_.* mean 'seed'"),
        ("p.csv", "prompt,model\nred,nano\n", "p.csv:1: a column is 'model'"),
        ("p.csv", "prompt,ode\nred,maybe\n", "p.csv:2: ode is 'maybe'. Expected True or False"),
        ("p.csv", "prompt,seed\n,1\n", "p.csv:2: prompt is None"),
        ("p.csv", 'prompt\nred\n"blue\n', "p.csv:3: .*quote"),
        ("p.jsonl", '{"prompt": "red"}\n{"prompt": red}\n', "p.jsonl:2: the line is not JSON"),
        ("p.jsonl", "[" * 100_000 + "\n", "p.jsonl:1: the line is not JSON"),
        ("p.jsonl", '["red"]\n', r'p.jsonl:1: the line is \["red"\]. Expected {"prompt": "…"}'),
        ("p.jsonl", '{"prompt": 3}\n', "p.jsonl:1: prompt is 3"),
        ("p.jsonl", '{"prompt": "red", "seed": 1.5}\n', "p.jsonl:1: seed is 1.5. Expected a whole number"),
        ("p.jsonl", '{"prompt": "red", "seed": true}\n', "p.jsonl:1: seed is True"),
        ("p.jsonl", '{"prompt": "red", "resolution": 480}\n', "p.jsonl:1: resolution is 480. Expected 480p"),
        ("p.jsonl", '{"prompt": "red", "image": 3}\n', "p.jsonl:1: image is 3. Expected the path"),
        ("p.jsonl", '{"prompt": "red", "seed": 1, "seed": 2}\n', "p.jsonl:1: the row names .*seed.* twice"),
        ("p.jsonl", '{"prompt": "red", "num-steps": 1, "num_steps": 2}\n', "p.jsonl:1: the row names .* twice"),
        ("p.jsonl", '{"prompt": "red", "sed": 1}\n', "p.jsonl:1: an option is 'sed'"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(tmp_path, name, text, words):
    with pytest.raises(InputError, match=words):
        prompts.read_prompts(write(tmp_path / name, text))


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "p.txt").write_bytes("red\r\n\ngrün\nblue".encode("latin-1"))
    with pytest.raises(InputError, match=r"p\.txt:3: the line is not in UTF-8"):
        prompts.read_prompts(tmp_path / "p.txt")
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        prompts.read_prompts(tmp_path / "q.txt")


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "NUL"])
def test_prompts_that_are_not_a_file_are_refused_unread(tmp_path, suffix, kind):
    path = tmp_path / f"p.{suffix}"
    if kind == "NUL":
        path = f"p\0.{suffix}"
    elif kind == "folder":
        path.mkdir()
    elif not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with a name")
    else:
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"^prompts is .*\. Expected a"):
        prompts.read_prompts(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "x" * 20_000),
        ("p.csv", f"{'x' * 20_000},{'x' * 20_000},prompt\na,b,c"),
        ("p.csv", f"prompt,seed\nred,{'x' * 20_000}"),
        ("p.jsonl", f'{{"{"x" * 20_000}": 1, "{"x" * 20_000}": 1}}'),
        ("p.jsonl", "{" + ",".join(f'"{n}": 1, "{n}": 1' for n in range(2000)) + "}"),
        ("p.jsonl", f'"{"x" * 20_000}"'),
        ("p.jsonl", f'{{"prompt": "red", "seed": "\\u001b[31m{"x" * 20_000}"}}'),
    ],
)
def test_the_error_of_a_row_is_a_short_line(tmp_path, name, text):
    path = write(tmp_path / name, text)
    with pytest.raises(InputError) as caught:
        prompts.read_prompts(path)
    (line,) = str(caught.value).splitlines()
    assert (
        line.startswith(f"{path}:")
        and ". Expected " in line
        and len(line) < 500 + len(str(path))
        and "\x1b" not in line
    )


def test_an_error_names_every_wrong_row_up_to_twenty(tmp_path):
    rows = ["prompt,seed,num_frames", "red,x,", "red,1,24", *["red,-1,"] * 20]  # 24 frames suit no model
    path = write(tmp_path / "p.csv", "\n".join(rows))
    with pytest.raises(InputError) as caught:
        runner.run(path, "nano", tmp_path / "out")
    *lines, more = str(caught.value).split("\n")
    assert [line.split(":")[1] for line in lines] == [str(n) for n in range(2, 22)] and more == "and 2 more"
    assert "num_frames is 24" in lines[1]


def test_every_job_is_checked_before_anything_is_loaded_or_written(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load", None)  # nothing can be loaded
    text = '{"prompt": "red"}\n{"prompt": "red", "num_frames": 24}\n{"prompt": "red", "image": "a.png"}\n'
    path = write(tmp_path / "p.jsonl", text)
    with pytest.raises(InputError, match=r"p.jsonl:2: num_frames is 24.*\n.*p.jsonl:3: image is given.*nano makes"):
        runner.run(path, "nano", tmp_path / "out")
    for load, options, words in [
        ("nano", {"num_steps": 5}, "prompt 1: num_steps is 5"),
        ("nano", {"steps": 4}, "an option is 'steps'"),
        ("nano", {"prompt": "x"}, "an option is 'prompt'"),
        ("nano", {"num_samples": 0}, "num_samples is 0"),
        ("nano", {"workers": 0}, "workers is 0"),
        ("nano", {"seed": settings.MAX_SEED, "num_samples": 2}, "prompt 1: seed is .* for 2 samples"),
        ("nanno", {}, "mean 'nano'"),
        ({"model": "nano", "attention": "sla"}, {}, "an option is 'attention'"),
        ({"model": "nano", "device": "cpu", "memory_plan": "group"}, {}, "group"),
        (3, {}, "pipeline is a int"),
    ]:
        with pytest.raises(InputError, match=words):
            runner.run(PROMPTS, load, tmp_path / "out", **options)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="prompt 1: noise_device is 'cuda'"):
        runner.run(PROMPTS, {"model": "nano", "device": "cpu"}, tmp_path / "out", noise_device="cuda")
    with pytest.raises(InputError, match="prompts is empty"):
        runner.run([], "nano", tmp_path / "out")
    with pytest.raises(InputError, match="a: an option is 'model'"):
        runner.run([prompts.Job(prompt="red", settings={"model": "nano"}, source="a")], "nano", tmp_path / "out")
    with pytest.raises(OutputError, match="is a file"):
        runner.run(PROMPTS, "nano", path)
    assert list(tmp_path.iterdir()) == [path]


# Ids


def ids(prompts, load="nano", **options):
    return [task.id for task in jobs.Tasks(prompts, runner.model_of(load), Path("out"), options)]


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have a GPU with 80 GB, and all released models"""
    monkeypatch.setattr(probe, "device_of", lambda device: "cuda" if device == "auto" else device)
    monkeypatch.setattr(probe, "free_memory", lambda device: 80e9)
    monkeypatch.setattr(hub, "cached", lambda *args, **kwargs: "here")


def test_an_id_is_what_determines_the_video(nano, monkeypatch):
    base = ids(["a red circle"])
    assert base == ids(["a red circle"], num_frames=25, resolution="128x128", seed=0)  # the model's own, spelled out
    assert base == ids(["a red circle"], "auto") == ids(["a red circle"], {"model": Path("nano")})
    assert base == ids(["a red circle"], nano)
    with monkeypatch.context() as patch:
        patch.setattr(probe, "device_of", lambda device: device)
        patch.setattr(probe, "free_memory", lambda device: 80e9)
        on_a_gpu = {"model": "nano", "device": "cuda", "memory_plan": "auto", "sla_topk": 0.15}
        assert base == ids(["a red circle"], on_a_gpu)
        patch.setattr("torch.cuda.is_available", lambda: True)
        noise_of_the_gpu = ids(["a red circle"], on_a_gpu, noise_device="cuda")
    others = [
        *noise_of_the_gpu,
        *ids(["a blue circle"]),
        *(
            ids(["a red circle"], **{name: value})[0]
            for name, value in {
                "seed": 1, "num_steps": 2, "num_frames": 5, "resolution": "64x64", "sigma_max": 90.0, "ode": True,
            }.items()
        ),
        *(
            ids(["a red circle"], {"model": "nano", name: value})[0]
            for name, value in {"sla_topk": 0.2, "attention_type": "original", "quant_linear": True}.items()
        ),
    ]  # fmt: skip
    assert len({*base, *others}) == 1 + len(others) == 12


def test_changed_weights_change_the_id(tmp_path):
    from peft import LoraConfig

    loaded = pipeline.load_pipeline("nano", device="cpu")
    first = ids(PROMPTS, loaded)
    assert first == ids(PROMPTS) == ids(PROMPTS, LoadedModel.of(loaded).resolved)
    sla.set_topk(loaded.transformer, 0.5)
    assert ids(PROMPTS, loaded) == ids(PROMPTS, {"model": "nano", "sla_topk": 0.5}) != first
    sla.set_topk(loaded.transformer, 0.15)
    assert ids(PROMPTS, loaded) == first

    loaded.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(InputError, match="merge the LoRA first"):
        runner.run(PROMPTS, loaded, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    loaded.transformer.fuse_lora()
    assert not set(ids(PROMPTS, loaded)) & set(first)
    loaded.transformer.unload_lora()
    assert not set(ids(PROMPTS, loaded)) & set(first)


def test_a_run_on_the_cpu_of_a_gpu_machine_is_resolved_once(nano, made, gpu, tmp_path, monkeypatch):
    loaded, resolved = [], []
    monkeypatch.setattr(pipeline, "load", lambda model, **_: loaded.append(model) or nano)
    monkeypatch.setattr(runner, "resolve", lambda options: resolved.append(resolve.resolve(options)) or resolved[-1])
    result = runner.run(PROMPTS, settings.LoadOptions(device="cpu"), tmp_path, num_frames=1)
    assert [record.id for record in result.records] == ids(PROMPTS, nano, num_frames=1)
    assert not {record.id for record in result.records} & {*ids(PROMPTS, "auto", num_frames=1)}
    assert loaded == resolved[:1] and loaded[0].spec is catalog.NANO and loaded[0].device == "cpu"


def test_an_actor_cannot_decide_otherwise(gpu, monkeypatch):
    monkeypatch.setattr(probe, "free_memory", lambda device: 24e9 if device == "cuda" else 200e9)
    model = resolve.resolve(settings.LoadOptions())
    assert model.spec is not catalog.NANO and model.quant_linear
    order = actor.Order(options=replace(model.pinned, device="cuda"), identity=model.identity, clip=(16, 16, 1),
                          prompts=(), mark=Path("out/mark"))  # fmt: skip
    order = pickle.loads(pickle.dumps(order))
    for memory in (1e9, 24e9, 180e9):  # on which "auto" stands for nano, 8-bit and bf16
        monkeypatch.setattr(probe, "free_memory", lambda device, memory=memory: memory)
        there = order.resolve()
        assert (there.spec, there.quant_linear, there.transformers) == (model.spec, True, model.transformers)
        assert (there.device, there.identity) == ("cuda", model.identity)
    with pytest.raises(TurboNbError, match=r"in an actor\. Expected .*'quant_linear': True"):
        replace(order, options=replace(order.options, quant_linear=False)).resolve()


def test_weights_are_known_by_content_not_by_name(tmp_path):
    data = bytearray(np.random.default_rng(0).bytes(3 * fingerprint.PIECE * fingerprint.PIECES // 2))
    first, moved = tmp_path / "a.pth", tmp_path / "b.pth"
    first.write_bytes(data)
    before = fingerprint.fingerprint(first)
    first.rename(moved)
    assert fingerprint.fingerprint(moved) == before
    data[len(data) // 2 : len(data) // 2 + 2 * fingerprint.PIECE] = bytes(2 * fingerprint.PIECE)
    moved.write_bytes(data)
    assert fingerprint.fingerprint(moved) != before
    folder = shutil.copytree(catalog.NANO.folder / "vae", tmp_path / "vae")
    whole = ids(["red"], {"model": "nano", "vae": folder})
    assert whole == ids(["red"], {"model": "nano", "vae": shutil.copytree(folder, tmp_path / "moved")}) != ids(["red"])
    weights = folder / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = bytes(4)
    weights.write_bytes(data)
    assert ids(["red"], {"model": "nano", "vae": folder}) != whole


# Runs


def test_a_batch_is_videos_manifest_and_contact_sheet(nano, made, tmp_path):
    told = []
    jobs = [*PROMPTS, "a red circle", prompts.Job(prompt="Ein GRÜNES Dreieck!", settings={"resolution": "64x32"})]
    summary = run(nano, tmp_path, jobs, on_record=lambda record, *count: told.append((record.prompt, *count)))
    assert told == [(prompt, n, 4) for n, prompt in enumerate([*PROMPTS, "Ein GRÜNES Dreieck!"], 1)]
    assert (summary.made, len(summary.done), summary.failed, summary.repeated) == (4, 4, [], 1)
    names = [record.file for record in summary.records]
    slugs = ["a-red-circle", "a-blue-square", "a-green-triangle", "ein-grunes-dreieck"]
    assert names == [f"{record.id}-{slug}.mp4" for record, slug in zip(summary.records, slugs, strict=True)]
    assert {p.name for p in tmp_path.iterdir()} == {*names, manifest.MANIFEST, SHEET, manifest.LOCK}
    assert manifest.read_manifest(tmp_path) == summary.records
    for record in summary.records:
        told = mp4.read_metadata(tmp_path / record.file)
        assert (told["job"], told["prompt"]) == (record.id, record.prompt)
        assert record.timings.keys() == {"text", "denoise", "write"}
    from PIL import Image

    assert Image.open(summary.sheet).size == (2 * (3 * 128 + 2 * 2 + 8) + 8, 2 * (128 + 18 + 8) + 8)
    table = str(summary).splitlines()
    assert table[0].split() == ["video", "prompt", "seed", "text", "denoise", "decode", "write", "total"]
    assert table[1].startswith(names[0]) and " 0  " in table[1] and "1.50" in table[1]
    assert table[-1].startswith("4 made, 0 there before, 0 failed, 1 asked for twice")


def test_a_second_run_does_nothing(nano, made, tmp_path, monkeypatch):
    first = run(nano, tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.glob("[!.]*")}
    monkeypatch.setattr(pipeline, "load", None)  # nothing can be loaded
    monkeypatch.setattr(mp4, "read_metadata", None)  # the manifest is enough
    second = runner.run(PROMPTS, "nano", tmp_path, num_frames=1)
    assert (second.made, second.records) == (0, first.records)
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.glob("[!.]*")}
    assert "0 made, 3 there before" in second.line()


def test_every_video_and_the_batch_say_what_they_cost(nano, made, tmp_path, monkeypatch):
    assert "$" not in str(run(nano, tmp_path, PROMPTS[:1]))
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "3600")  # a dollar a second
    told = []
    summary = run(nano, tmp_path, on_record=lambda record, *_: told.append(batch.describe(record)))
    before, *after = summary.records
    assert before.cost is None and [sum(r.timings.values()) for r in after] == [r.cost for r in after]
    assert [f"${record.cost:.4f}" for record in after] == [line.split()[-1] for line in told]
    head, first, second, *_, line = str(summary).splitlines()
    assert head.split()[-1] == "cost" and "$" not in first and second.endswith(f"${after[0].cost:.4f}")
    assert f"in {summary.seconds:.1f} s, ${summary.seconds:.4f}; " in line


def test_no_seed_is_the_default(nano, made, tmp_path):
    result = run(nano, tmp_path, [*PROMPTS[:1], prompts.Job(prompt="blue", settings={"seed": None})], seed=None)
    assert [record.settings.seed for record in result.records] == [0, 0]
    assert result.records[0].id == ids(PROMPTS[:1], nano, num_frames=1)[0]


def test_samples_have_their_own_seeds(nano, made, tmp_path):
    summary = run(nano, tmp_path, [prompts.Job(prompt="red", settings={"seed": 5}), "blue"], num_samples=2, seed=1)
    told = [(record.prompt, record.settings.seed) for record in summary.records]
    assert told == [("red", 5), ("red", 6), ("blue", 1), ("blue", 2)]


def test_a_failed_prompt_is_recorded_and_tried_again_last(nano, made, tmp_path, monkeypatch):
    jobs = ["a red circle", "a bad <b>shape</b>", "a blue square"]
    first = run(nano, tmp_path, jobs)
    assert made == ["a red circle", "a blue square"]
    assert [record.status for record in first.records] == ["done", "failed", "done"]
    assert first.failed[0].error == "the model's output is not finite"
    assert "failed: prompt 2: the model's output is not finite" in str(first)
    assert "&lt;b&gt;" in first._repr_html_() and "<b>" not in first._repr_html_()

    def out_of_memory(*args, **kwargs):
        raise RuntimeError("no memory")

    order = []
    monkeypatch.setattr(generation, "generate", out_of_memory)
    second = run(nano, tmp_path, [*jobs, "new"], on_record=lambda record, *_: order.append(record.prompt))
    assert order == ["new", "a bad <b>shape</b>"]
    assert [record.error for record in second.failed] == ["RuntimeError: no memory"] * 2
    assert (second.made, len(second.done), len(videos(tmp_path))) == (0, 2, 2)


def test_a_lost_gpu_or_a_full_disk_ends_the_run(nano, made, tmp_path, monkeypatch):
    def lost(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate", lost)
        with pytest.raises(TurboNbError, match=r"illegal memory access.*Start again"):
            run(nano, tmp_path)
    assert [record.status for record in manifest.read_manifest(tmp_path)] == ["failed"]

    def full(*args, **kwargs):
        raise OutputError("No space left")

    with monkeypatch.context() as patch:
        patch.setattr(mp4.Encoder, "save", full)
        with pytest.raises(OutputError, match="No space"):
            run(nano, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(environment, "free_bytes", lambda folder: 100)
        count = len(made)
        with pytest.raises(OutputError, match=r"needs about [\d,]+ bytes, and 100 are free\. Free some space"):
            run(nano, tmp_path)
        assert len(made) == count
    assert len(manifest.read_manifest(tmp_path)) == 1 and run(nano, tmp_path).made == 3
    monkeypatch.setattr(environment, "free_bytes", lambda folder: 100)
    assert run(nano, tmp_path).made == 0


def test_a_kill_between_the_video_and_its_line_neither_loses_nor_repeats_it(nano, made, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manifest.Manifest, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            run(nano, tmp_path)
    assert manifest.read_manifest(tmp_path) == [] and len(videos(tmp_path)) == 1
    before = videos(tmp_path)
    (tmp_path / f".{next(iter(before))[:30]}.x1y2.mp4").write_text("torn")
    (tmp_path / f"{atomic.PREFIX}0123456789abcdef.mp4").write_text("torn")
    (tmp_path / f"{atomic.PREFIX}0123456789abcdef.png").write_text("torn")
    (tmp_path / ".mine.mp4").write_text("")
    summary = run(nano, tmp_path)
    assert made == PROMPTS and summary.made == 2 and len(summary.done) == 3
    assert videos(tmp_path).items() >= before.items()
    assert {path.name for path in tmp_path.glob(".*")} == {".mine.mp4", manifest.LOCK}
    assert [record.prompt for record in manifest.read_manifest(tmp_path)] == PROMPTS


def test_only_what_is_missing_is_made_again(nano, made, tmp_path):
    files = [tmp_path / record.file for record in run(nano, tmp_path).records]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:100])
    files[2].write_bytes(files[2].read_bytes()[:-1])  # its metadata are whole
    assert run(nano, tmp_path).made == 3
    assert made == [*PROMPTS, *PROMPTS] and mp4.read_metadata(files[1])["prompt"] == PROMPTS[1]
    (tmp_path / manifest.MANIFEST).unlink()
    assert run(nano, tmp_path).made == 0 and len(manifest.read_manifest(tmp_path)) == 3
    files[0].write_bytes(files[2].read_bytes())  # whole, but another job's
    assert run(nano, tmp_path).made == 1


@pytest.mark.parametrize("torn", [b'{"id": "abc', b'{"id": "abc", "status": "done"}', b"\0\0\0\n", b"[]\n", b"\n"])
def test_a_torn_line_is_ignored_and_removed(nano, made, tmp_path, torn):
    records = run(nano, tmp_path).records
    path = tmp_path / manifest.MANIFEST
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert manifest.read_manifest(tmp_path) == records and path.read_bytes() == whole + torn
    assert run(nano, tmp_path).made == 0 and path.read_bytes() == whole
    path.write_bytes(whole + torn)
    run(nano, tmp_path, [*PROMPTS, "one more"])
    assert len([json.loads(line) for line in path.read_bytes().splitlines()]) == 4


HOSTILE = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"1" * 5000,
    b'{"id": null, "status": "done"}',
    b'{"id": "a", "status": null}',
    b'{"id": "a", "status": ["done"]}',
    b'{"id": "a", "status": "skipped"}',
    b'{"id": "a", "status": "done", "bytes": 1' + b"0" * 5000 + b"}",
    b'"\xff\xfe"',
    b"null",
]
ODD = [
    {"file": None},
    {"file": "../a.mp4", "settings": None},
    {"file": 3, "prompt": None, "timings": None, "steps": "x", "bytes": 10**400, "cost": 1e999},
    {"file": "\0.mp4", "settings": {"width": 10**300, "height": -1, "seed": 10**400}},
    {"file": "a.mp4", "prompt": "\ud800", "settings": {"width": 10**6, "height": 1}, "timings": {"text": 10**400}},
    {"file": "a.mp4", "settings": {"width": 0, "height": []}},
]


def test_a_hostile_manifest_never_raises(nano, made, tmp_path):
    first = run(nano, tmp_path).records
    path = tmp_path / manifest.MANIFEST
    odd = [{"id": record.id, "status": "done"} | ODD[n % len(ODD)] for n, record in enumerate(first)]
    odd += [{"id": str(n), "status": status} | line for n, line in enumerate(ODD) for status in ("done", "failed")]
    (tmp_path / "a.mp4").write_bytes((tmp_path / first[0].file).read_bytes())
    path.write_bytes(path.read_bytes() + b"\n".join([*HOSTILE, *(json.dumps(line).encode() for line in odd), b""]))
    read = batch.read_manifest(tmp_path)
    assert read[:3] == first and len(read) == 3 + len(odd)
    assert [str(batch.describe(record)) for record in read]
    again = run(nano, tmp_path)
    assert (again.made, again.failed, len(made)) == (0, [], 3) and str(again) and again._repr_html_()
    assert [replace(record, timings={}, time="") for record in again.records] == [
        replace(record, timings={}, time="") for record in first
    ]
    assert b"skipped" in path.read_bytes()  # a line of another version stays
    assert batch.read_manifest(tmp_path / "nowhere") == []


def test_errors_of_the_folder_are_output_errors(nano, made, tmp_path, monkeypatch):
    for name in (manifest.LOCK, manifest.MANIFEST):
        (tmp_path / name).mkdir()
        with pytest.raises(OutputError, match="output_dir"):
            run(nano, tmp_path)
        (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / manifest.MANIFEST)  # whose reader would wait for ever
    with pytest.raises(OutputError, match=r"manifest\.jsonl is not a file"):
        run(nano, tmp_path)
    (tmp_path / manifest.MANIFEST).unlink()

    def of_another_user(self):
        raise PermissionError(13, "Permission denied", "a/.lock")

    with monkeypatch.context() as patch:
        patch.setattr(manifest.FileLock, "acquire", of_another_user)
        with pytest.raises(OutputError, match="Permission denied"):
            run(nano, tmp_path)
    assert made == []


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_folder_without_locks_is_a_warning(nano, made, tmp_path, monkeypatch, error):
    def acquire(self):
        raise error

    monkeypatch.setattr(manifest.FileLock, "acquire", acquire)
    with pytest.warns(TurboNbWarning, match="cannot be locked .* Start no other run"):
        assert run(nano, tmp_path).made == 3


def test_a_lock_ends_with_a_process_that_is_killed(nano, made, tmp_path):
    code = "import sys, time\nfrom pathlib import Path\nfrom turbo_nb.batch import manifest\n"
    code += "with manifest.run_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"process {process.pid} on"):
            run(nano, tmp_path)
        process.kill()
    assert run(nano, tmp_path).made == 3


def test_a_contact_sheet_that_cannot_be_drawn_is_a_warning(nano, made, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sheet, "contact_sheet", full)
    with pytest.warns(TurboNbWarning, match="No space left on device.*The videos are kept"):
        result = run(nano, tmp_path)
    assert (result.made, result.sheet) == (3, None) and len(manifest.read_manifest(tmp_path)) == 3


def test_a_line_that_does_not_fit_on_the_disk(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *args, **kwargs): ...
        def __enter__(self):
            return self

        def __exit__(self, *args): ...
        def tell(self):
            return 0

        def write(self, line):
            return len(line) - 1

    monkeypatch.setattr(Path, "open", Full)
    with pytest.raises(OutputError, match=r"the disk is full\. .* Free some space"):
        manifest.append_row(tmp_path / manifest.MANIFEST, {"id": "a", "status": "failed"})


def test_two_runs_in_one_folder_are_kept_apart(nano, made, tmp_path):
    with (
        manifest.run_lock(tmp_path),
        pytest.raises(OutputError, match=rf"another run .*process {os.getpid()} on .*output_dir"),
    ):
        run(nano, tmp_path)
    with (
        manifest.worker_lock(tmp_path, 0),  # workers whose first process was killed
        manifest.worker_lock(tmp_path, 1),
        pytest.raises(OutputError, match="another run"),
    ):
        run(nano, tmp_path)
    assert made == [] and run(nano, tmp_path).made == 3


def test_a_picture_is_known_by_its_pixels(tmp_path, monkeypatch):
    from PIL import Image

    def picture(name, colour):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
        return [prompts.Job(prompt="it moves", settings={"image": tmp_path / name})]

    red, copy, blue = (
        next(iter(jobs.Tasks(picture(*kind), runner.model_of("Wan2.2-A14B"), tmp_path, {})))
        for kind in (("red.png", "red"), ("copy.bmp", "red"), ("blue.png", "blue"))
    )
    assert red.id == copy.id != blue.id
    # the id of this clip before clips could have a last frame
    assert jobs._task(red.settings, red.clip, {}, {"image": (64, 64, "0")}, tmp_path, "", None).id == "e64480bc9225"
    rows = [{"prompt": "it moves", "image": tmp_path / "red.png", "last_image": tmp_path / name}
            for name in ("red.png", "copy.bmp", "blue.png")]  # fmt: skip
    ids = [task.id for task in jobs.Tasks(rows, runner.model_of("Wan2.2-A14B"), tmp_path, {})]
    assert ids[0] == ids[1] != ids[2] and red.id not in ids
    opened = []
    monkeypatch.setattr(images, "load_image", lambda path, name: opened.append(path) or Image.open(path))
    rows = [*picture("red.png", "red"), *picture("blue.png", "blue")] * 2
    tasks = [*jobs.Tasks(rows, runner.model_of("Wan2.2-A14B"), tmp_path, {"adaptive_resolution": True}, 2)]
    assert len(tasks) == 8 and opened == [tmp_path / "red.png", tmp_path / "blue.png"]  # each file once
    assert [task.id for task in tasks[:4]] == [task.id for task in tasks[4:]]
    assert red.record("failed").image == str(tmp_path / "red.png")


def test_a_damaged_video_of_another_batch_is_left_off_the_sheet(nano, made, tmp_path):
    from PIL import Image

    record = run(nano, tmp_path, PROMPTS[:2]).records[0]
    (tmp_path / record.file).write_text("torn")
    assert Image.open(run(nano, tmp_path, ["another"]).sheet).height == 128 + 18 + 8 + 8  # two clips, not three


def test_a_pipeline_with_a_lora_is_refused(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(nano.transformer, "peft_config", {"default": ...}, raising=False)
    with pytest.raises(InputError, match="merge the LoRA first"):
        run(nano, tmp_path)


def test_workers_that_cannot_be(nano, made, tmp_path):
    for load, workers, words in [(nano, 2, "a loaded pipeline works in this process"), (nano, 0, "from 1 to")]:
        with pytest.raises(InputError, match=words):
            runner.run(PROMPTS, load, tmp_path, workers=workers)
    assert not list(tmp_path.iterdir())


# From a shell


def command(*arguments):
    return ["batch", *map(str, arguments), "--num_frames", "1", "--num_steps", "1"]


@pytest.fixture
def shell():
    from helpers import command_line  # not above: it loads torch, which workers that stand in for others need not

    return command_line


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(tmp_path, monkeypatch, shell):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # faster where other tests run beside it
    prompts = write(tmp_path / "p.txt", "\n".join(f"a red circle {n}" for n in range(3)))
    line = command(prompts, "--output_dir", tmp_path / "out", "--model", "nano")
    with subprocess.Popen(
        [sys.executable, "-m", "turbo_nb.cli", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    assert first.startswith("1/3  ") and process.returncode == 130, (first, rest, errors)
    made = 1 + rest.count("/3  ")
    assert f"cancelled; {made} made, which stay" in errors and "Traceback" not in errors
    assert len(videos(tmp_path / "out")) == made and not list((tmp_path / "out").glob(".*.mp4"))
    again = shell(*line, cwd=tmp_path)
    assert again.returncode == 0 and f"{3 - made} made, {made} there before, 0 failed" in again.stdout, again


def test_an_error_is_one_line(tmp_path, shell):
    prompts = write(tmp_path / "p.csv", "prompt,num_frames\na red circle,24\n")
    result = shell(*command(prompts, "--output_dir", tmp_path / "out", "--device", "cpu"), cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {prompts}:2: num_frames is 24")
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_killed_three_times():
    script = Path(__file__).with_name("kill_batch.py")
    result = subprocess.run([sys.executable, script, "--kills", "3"], capture_output=True, text=True)
    assert result.returncode == 0 and "'kills': 3" in result.stderr, result.stderr


# The notebook


def parameters():
    """The names and values of the notebook's cell of parameters"""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    source = "".join(next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", ()))["source"])
    values = {}
    exec(source, values)
    return {name: value for name, value in values.items() if name != "__builtins__"}


def test_the_notebook_has_the_options_and_their_defaults():
    declared = {
        name: one.default
        for cls in (settings.LoadOptions, settings.ClipSettings, settings.RunOptions)
        for name, one in cls.__dataclass_fields__.items()
    }
    found = parameters()
    assert found.keys() - declared.keys() == {"prompts", "prompts_path"}
    assert found.keys() >= {"model", "output_dir", "num_samples", *prompts.ROW_OPTIONS} - {*settings.PICTURES}
    for name in found.keys() & declared.keys():
        assert str(found[name]) == str(declared[name]), name


def test_the_notebook_takes_one_prompt(tmp_path):
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]]
    values = parameters() | {"prompts": "红圆"}  # as papermill gives `-p prompts 红圆`
    exec(next(source for source in cells if source.startswith("from turbo_nb import batch")), values)
    assert [(job.prompt, job.settings) for job in values["jobs"]] == [("红圆", {})]


def test_the_notebook_takes_other_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytest.importorskip("papermill", reason="papermill is not installed")
    prompts = write(tmp_path / "p.csv", "prompt,seed\na large red circle,1\na large red circle,2\n")
    parameters = {"prompts_path": str(prompts), "output_dir": str(tmp_path / "made"), "num_frames": 1, "num_steps": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notebook.run_notebook(NOTEBOOK, tmp_path / "new" / "done.ipynb", parameters, cwd=str(tmp_path))
    assert [record.settings.seed for record in manifest.read_manifest(tmp_path / "made")] == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"p.csv", "made", "new"}


def test_unknown_parameters_are_refused(tmp_path):
    pytest.importorskip("papermill", reason="papermill is not installed")
    with pytest.raises(InputError, match=r"ipynb is 'num_step'. Expected .*num_steps.* Did you mean 'num_steps'\?"):
        notebook.run_notebook(NOTEBOOK, tmp_path / "done.ipynb", {"num_step": 1, "output_dir": "x"})
    with pytest.raises(InputError, match="does not exist"):
        notebook.run_notebook(tmp_path / "no.ipynb", tmp_path / "done.ipynb")
    assert not (tmp_path / "done.ipynb").exists()


@pytest.mark.parametrize("data", [b"junk", b"[]", b"\xff\xfe\0"])
def test_a_notebook_that_cannot_be_read_is_an_input_error(tmp_path, data):
    pytest.importorskip("papermill", reason="papermill is not installed")
    (tmp_path / "a.ipynb").write_bytes(data)
    with pytest.raises(InputError, match=r"a.ipynb', which cannot be read \(.*Expected an .ipynb file"):
        notebook.run_notebook(tmp_path / "a.ipynb", tmp_path / "done.ipynb")


@pytest.mark.parametrize("output", [".", "file/done.ipynb", "n" * 300 + ".ipynb"])
def test_a_copy_that_cannot_be_written_is_an_error_before_the_run(tmp_path, output):
    pytest.importorskip("papermill", reason="papermill is not installed")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"^output is .*which cannot be written \(.*Choose another"):
        notebook.run_notebook(NOTEBOOK, tmp_path / output)


def test_a_path_that_no_system_takes_is_an_input_error(tmp_path):
    pytest.importorskip("papermill", reason="papermill is not installed")
    with pytest.raises(InputError, match="does not exist"):
        notebook.run_notebook(tmp_path / ("n" * 300 + ".ipynb"), tmp_path / "done.ipynb")
    for wrong in ("", "a\0b", 5):
        with pytest.raises(InputError, match=r"^output is .*Expected a path"):
            notebook.run_notebook(NOTEBOOK, wrong)


def test_without_papermill(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)
    with pytest.raises(TurboNbError, match=r"pip install 'turbo-nb\[notebook\]'"):
        notebook.run_notebook(NOTEBOOK, tmp_path / "done.ipynb")
