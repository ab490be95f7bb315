"""turbo-nb: the command line. Underscore and dash spellings of an option are the same."""

import os
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .errors import InputError, TurboNbError

app = typer.Typer(
    help="TurboDiffusion video models, from wheels alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)


@app.callback()
def turbo_nb() -> None:
    """TurboDiffusion video models, from wheels alone."""


Prompt = Annotated[str, typer.Option(help="What to show.")]
SavePath = Annotated[Path, typer.Option("--save-path", help="The mp4 to write.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same video.")]
NumSteps = Annotated[int, typer.Option(help="1 to 4.")]
NumFrames = Annotated[int | None, typer.Option(help="4n + 1; the model's own if left out.")]
Resolution = Annotated[str | None, typer.Option(help="480p, 720p or WIDTHxHEIGHT.")]
AspectRatio = Annotated[str | None, typer.Option(help="1:1, 4:3, 3:4, 16:9 or 9:16, with 480p or 720p.")]
SigmaMax = Annotated[float | None, typer.Option(help="First noise level; larger is sharper, less diverse.")]
Ode = Annotated[bool, typer.Option("--ode", help="Sample the ODE: sharper, less robust.")]
NumSamples = Annotated[int, typer.Option(help="Videos to make, with seed, seed + 1, …")]
Grid = Annotated[bool, typer.Option("--grid", help="Put the samples side by side into one file.")]
AttentionType = Annotated[str, typer.Option(help="sla, sagesla or original (dense).")]
AttentionBackend = Annotated[str | None, typer.Option(help="Of SageSLA: gluon, triton, spargeattn, reference (slow).")]
SlaTopk = Annotated[float | None, typer.Option(help="Share of key blocks that SLA attends to.")]
QuantLinear = Annotated[
    bool | None, typer.Option("--quant-linear/--no-quant-linear", help="8-bit linears or not; else as the file has it.")
]
DefaultNorm = Annotated[bool, typer.Option("--default-norm", help="Upstream's flag; norms here are always plain ones.")]
VaePath = Annotated[Path | None, typer.Option(help="Wan2.1_VAE.pth, or a folder in diffusers layout.")]
TextEncoderPath = Annotated[Path | None, typer.Option(help="models_t5_umt5-xxl-enc-bf16.pth, or a folder.")]
TokenizerPath = Annotated[Path | None, typer.Option(help="The folder of umT5's tokenizer.")]
MemoryPlan = Annotated[str, typer.Option("--plan", help="Where the parts go; auto takes the fastest that fits.")]
Memory = Annotated[float | None, typer.Option(help="Plan for this many GB of GPU memory, not for what is free.")]
NoiseDevice = Annotated[str, typer.Option(help="cpu: the same clip everywhere; cuda: upstream's seeds.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command()
def t2v(
    prompt: Prompt,
    save_path: SavePath = Path("video.mp4"),
    model: Annotated[str, typer.Option(help="A model's name, auto, a checkpoint or a diffusers folder.")] = "auto",
    dit_path: Annotated[Path | None, typer.Option(help="The checkpoint; the model is what its tensors say.")] = None,
    seed: Seed = 0,
    num_steps: NumSteps = 4,
    num_frames: NumFrames = None,
    resolution: Resolution = None,
    aspect_ratio: AspectRatio = None,
    sigma_max: SigmaMax = None,
    ode: Ode = False,
    num_samples: NumSamples = 1,
    grid: Grid = False,
    attention_type: AttentionType = "sla",
    attention_backend: AttentionBackend = None,
    sla_topk: SlaTopk = None,
    quant_linear: QuantLinear = None,
    default_norm: DefaultNorm = False,
    vae_path: VaePath = None,
    text_encoder_path: TextEncoderPath = None,
    tokenizer_path: TokenizerPath = None,
    memory_plan: MemoryPlan = "auto",
    memory: Memory = None,
    noise_device: NoiseDevice = "cpu",
    device: Device = "auto",
) -> None:
    """Make a video from a prompt."""
    if dit_path and model == "auto":
        model, dit_path = dit_path, None
    _make(
        prompt, save_path, num_samples, grid,
        {
            "num_frames": num_frames, "num_steps": num_steps, "seed": seed, "resolution": resolution,
            "aspect_ratio": aspect_ratio, "sigma_max": sigma_max, "ode": ode, "noise_device": noise_device,
        },
        {
            "model": model, "checkpoint": dit_path, "attention_type": attention_type, "sla_topk": sla_topk,
            "attention_backend": attention_backend, "quant_linear": "auto" if quant_linear is None else quant_linear,
            "vae": vae_path, "text_encoder": text_encoder_path, "tokenizer": tokenizer_path,
            "memory_plan": memory_plan, "memory": memory and memory * 1e9, "device": device,
        },
    )  # fmt: skip


@app.command()
def i2v(
    prompt: Prompt,
    image_path: Annotated[Path, typer.Option(help="The picture that the video begins with.")],
    save_path: SavePath = Path("video.mp4"),
    model: Annotated[str, typer.Option(help="A name, a folder, or auto: what the checkpoints are.")] = "Wan2.2-A14B",
    high_noise_model_path: Annotated[Path | None, typer.Option(help="Checkpoint of the high-noise expert.")] = None,
    low_noise_model_path: Annotated[Path | None, typer.Option(help="Checkpoint of the low-noise expert.")] = None,
    boundary: Annotated[float | None, typer.Option(help="Noise level where the low-noise expert takes over.")] = None,
    adaptive_resolution: Annotated[
        bool, typer.Option("--adaptive-resolution", help="Keep the picture's aspect, at the resolution's area.")
    ] = False,
    seed: Seed = 0,
    num_steps: NumSteps = 4,
    num_frames: NumFrames = None,
    resolution: Resolution = None,
    aspect_ratio: AspectRatio = None,
    sigma_max: SigmaMax = None,
    ode: Ode = False,
    num_samples: NumSamples = 1,
    grid: Grid = False,
    attention_type: AttentionType = "sla",
    attention_backend: AttentionBackend = None,
    sla_topk: SlaTopk = None,
    quant_linear: QuantLinear = None,
    default_norm: DefaultNorm = False,
    vae_path: VaePath = None,
    text_encoder_path: TextEncoderPath = None,
    tokenizer_path: TokenizerPath = None,
    memory_plan: MemoryPlan = "auto",
    memory: Memory = None,
    noise_device: NoiseDevice = "cpu",
    device: Device = "auto",
) -> None:
    """Make a video from a picture and a prompt."""
    experts = (high_noise_model_path, low_noise_model_path)
    if any(experts) and not all(experts):
        raise InputError("give both experts, --high_noise_model_path and --low_noise_model_path, or none of them")
    checkpoint = experts if all(experts) else None
    if checkpoint and model == "auto":
        model, checkpoint = checkpoint, None
    _make(
        prompt, save_path, num_samples, grid,
        {
            "image": image_path, "num_frames": num_frames, "num_steps": num_steps, "seed": seed, "ode": ode,
            "resolution": resolution, "aspect_ratio": aspect_ratio, "adaptive_resolution": adaptive_resolution,
            "sigma_max": sigma_max, "boundary": boundary, "noise_device": noise_device,
        },
        {
            "model": model, "checkpoint": checkpoint, "attention_type": attention_type,
            "sla_topk": sla_topk, "attention_backend": attention_backend,
            "quant_linear": "auto" if quant_linear is None else quant_linear,
            "vae": vae_path, "text_encoder": text_encoder_path, "tokenizer": tokenizer_path,
            "memory_plan": memory_plan, "memory": memory and memory * 1e9, "device": device,
        },
    )  # fmt: skip


def _make(prompt: str, save_path: Path, num_samples: int, grid: bool, clip: dict, load: dict) -> None:
    """Load a pipeline with the arguments `load`, and make `num_samples` clips of the arguments `clip`."""
    from . import generation, pipeline
    from .files import resolve
    from .machine import environment
    from .video import mp4, sheet

    if load["model"] == "auto":
        load["model"], load["quant_linear"] = resolve.choose(
            **{k: load[k] for k in ("device", "memory", "quant_linear")}
        )
    if num_samples < 1:
        raise InputError(f"num_samples is {num_samples}; it is 1 or more")
    seeds = range(clip["seed"], clip["seed"] + num_samples)
    paths = [save_path]
    if num_samples > 1 and not grid:
        paths = [save_path.with_name(f"{save_path.stem}-{seed}{save_path.suffix}") for seed in seeds]
    for path in paths:
        mp4.check_output(path)
    size = generation.check_clip(load["model"], prompt, **clip)

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:8}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("load", total=None)
        loaded = pipeline.load_pipeline(
            **load,
            clip=size,
            prompts=[prompt],
            on_plan=lambda plan: plan.name == "resident" or progress.console.print(str(plan)),
            on_progress=lambda fetched: progress.update(
                bar, description=fetched.stage, completed=fetched.done, total=fetched.total
            ),
        )
        if outlook := generation.outlook(loaded, prompt, **clip):
            progress.console.print(f"a video takes {outlook}")
        steps, clips = clip["num_steps"], []
        for seed in seeds:
            path = paths[0 if grid else seed - seeds[0]]
            with nullcontext() if grid else mp4.Encoder(path, loaded.spec.fps) as encoder:
                video = generation.generate(
                    loaded,
                    prompt,
                    **clip | {"seed": seed},
                    on_stage=lambda name: progress.reset(
                        bar, description=name, total=steps if name == "denoise" else None
                    ),
                    on_step=lambda done, total, latents: progress.update(bar, completed=done),
                    on_frames=encoder and encoder.add,
                )
                if grid:
                    clips.append(video.frames)
                    if seed != seeds[-1]:
                        continue
                    video = replace(video, frames=sheet.grid(clips), settings=video.settings | {"seed": [*seeds]})
                progress.reset(bar, description="write", total=None)
                begin = time.perf_counter()
                video.save(encoder or path)
                timings = video.timings | {"write": time.perf_counter() - begin}
            frames, height, width, _ = video.frames.shape
            print(f"{path}: {frames} frames of {width}x{height} at {video.fps} fps, seed {seed}")
            each = {"denoise": video.steps}
            times = "  ".join(_timing(n, seconds, video.peaks.get(n), each.get(n)) for n, seconds in timings.items())
            print(times + environment.dollars(environment.cost(sum(timings.values())), "  "))


def _timing(stage: str, seconds: float, peak: int | None, steps: tuple[float, ...] | None) -> str:
    """A stage's seconds, the most GPU memory in it, and the seconds of its steps"""
    more = [f"{peak / 1e9:.1f} GB"] if peak else []
    more += ["steps " + " ".join(f"{step:.2f}" for step in steps)] if steps else []
    return f"{stage} {seconds:.2f} s" + (f" ({'; '.join(more)})" if more else "")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="An mp4 that turbo-nb made, or a checkpoint.")],
) -> None:
    """Print how a video was made, or what a checkpoint is."""
    if not file.exists():
        raise InputError(f"no file {str(file)!r}; give an mp4 that turbo-nb made, or a checkpoint")
    if file.suffix == ".mp4":
        from .video import mp4

        for name, value in mp4.read_metadata(file).items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {item}" for key, item in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(str, value))
            print(f"{name:15} {value}")
        return
    from .files import recognise

    print(recognise.read(file))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint: transformer, VAE or text encoder.")],
    folder: Annotated[Path, typer.Argument(help="The diffusers folder to write it into.")],
    lora: Annotated[list[str] | None, typer.Option(help="FILE or FILE:SCALE to merge first; may be repeated.")] = None,
    low_noise: Annotated[
        bool, typer.Option("--low-noise", help="The transformer is an image-to-video model's low-noise expert.")
    ] = False,
) -> None:
    """Write a checkpoint as a part of a diffusers folder (safetensors). LoRAs can be merged into a bf16 transformer."""
    from .files import convert

    print(convert.convert(source, folder, loras=lora or (), low_noise=low_noise))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, to paste or to parse.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 on warnings.")] = False,
) -> None:
    """Check this machine: what runs here, on what, and what to mend. Exit code 2 where nothing can run."""
    from .checkup import doctor

    report = doctor.doctor()
    if as_json:
        import json

        print(json.dumps(report.to_dict(), indent=2))
    else:
        from rich import print as rich_print

        rich_print(report)
    raise typer.Exit(report.exit_code(strict))


@app.command()
def download(
    model: Annotated[str, typer.Argument(help="A model's name, or auto: the best that fits this GPU.")],
    quant: Annotated[
        bool | None,
        typer.Option("--quant/--no-quant", help="The int8 files or the bf16 ones; else what suits this GPU."),
    ] = None,
) -> None:
    """Fetch a model's files into the Hub cache ($HF_HOME): the plan, the transfer, and where they lie."""
    from .files import resolve

    files = resolve.download_model(model, quantised=quant)
    if files:
        print(files)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A model's name; a released one must have been downloaded.")] = "nano",
    quant: Annotated[bool, typer.Option("--quant", help="The files with int8 linears.")] = False,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, to paste or to parse.")] = False,
) -> None:
    """Try this machine and a model: operations, files, a step, a short clip. Exit code 2 where something is wrong."""
    from .checkup import selftest

    result = selftest.verify(model, quantised=quant, device=device)
    if as_json:
        import json

        print(json.dumps(result.to_dict(), indent=2))
    else:
        from rich import print as rich_print

        rich_print(result)
    raise typer.Exit(result.exit_code)


@app.command()
def batch(
    prompts: Annotated[
        Path, typer.Argument(help="txt (a prompt a line), csv or jsonl (rows with their own settings).")
    ],
    output_dir: Annotated[Path, typer.Option(help="The folder of videos and manifest.")] = Path("outputs/batch"),
    model: Annotated[str, typer.Option(help="A model's name, auto, a checkpoint or a diffusers folder.")] = "auto",
    dit_path: Annotated[Path | None, typer.Option(help="The checkpoint; the model is what its tensors say.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes, each with the model; one a GPU if left out.")] = None,
    seed: Seed = 0,
    num_steps: NumSteps = 4,
    num_frames: NumFrames = None,
    resolution: Resolution = None,
    aspect_ratio: AspectRatio = None,
    sigma_max: SigmaMax = None,
    ode: Ode = False,
    num_samples: NumSamples = 1,
    attention_type: AttentionType = "sla",
    attention_backend: AttentionBackend = None,
    sla_topk: SlaTopk = None,
    quant_linear: QuantLinear = None,
    default_norm: DefaultNorm = False,
    vae_path: VaePath = None,
    text_encoder_path: TextEncoderPath = None,
    tokenizer_path: TokenizerPath = None,
    memory_plan: MemoryPlan = "auto",
    memory: Memory = None,
    noise_device: NoiseDevice = "cpu",
    device: Device = "auto",
) -> None:
    """Make a video from every prompt of a file. Started again, it makes what is missing. Exit code 1 if any failed."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .batch import prompts, runner, summary

    if dit_path and model == "auto":
        model, dit_path = dit_path, None
    made, console = 0, Console(stderr=True)
    columns = (TextColumn("{task.description:8}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("load", total=None)

            def show(record: dict, number: int, total: int) -> None:
                nonlocal made
                made += record["status"] == "done"
                progress.update(bar, description="make", completed=number, total=total)
                print(f"{number}/{total}  {summary.describe(record)}", flush=True)

            summary = runner.run(
                prompts.read_prompts(prompts),
                {
                    "model": model, "checkpoint": dit_path, "attention_type": attention_type, "sla_topk": sla_topk,
                    "attention_backend": attention_backend, "device": device, "memory_plan": memory_plan,
                    "quant_linear": "auto" if quant_linear is None else quant_linear,
                    "vae": vae_path, "text_encoder": text_encoder_path, "tokenizer": tokenizer_path,
                    "memory": memory and memory * 1e9,
                },
                output_dir, workers=workers, num_samples=num_samples, on_record=show,
                on_progress=lambda fetched: progress.update(
                    bar, description=fetched.stage, completed=fetched.done, total=fetched.total
                ),
                num_frames=num_frames, num_steps=num_steps, seed=seed, resolution=resolution,
                aspect_ratio=aspect_ratio, sigma_max=sigma_max, ode=ode, noise_device=noise_device,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"cancelled; {made} made, which stay: the same command makes the rest", file=sys.stderr)
        raise typer.Exit(130) from None
    print(summary)
    raise typer.Exit(int(bool(summary.failed)))


def main() -> None:
    """Entry point: a TurboNbError is one line on stderr and exit code 2, Ctrl-C exit code 130."""
    warnings.showwarning = _show_note
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own bar is on the screen
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is not for the user of a command
    try:
        app()
    except TurboNbError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("cancelled; only what was finished is there", file=sys.stderr)
        sys.exit(130)


def _show_note(message, category, filename, lineno, file=None, line=None) -> None:
    """Our own remarks are one line; other libraries' warnings are not for the user of a command."""
    if issubclass(category, UserWarning) and "turbo_nb" in filename:
        print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
