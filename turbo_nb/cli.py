"""turbo-nb: the command line. Underscore and dash spellings of an option are the same."""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .errors import TurboNbError

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


@app.command()
def t2v(
    prompt: Annotated[str, typer.Option(help="What to show.")],
    save_path: Annotated[Path, typer.Option("--save-path", help="The mp4 to write.")] = Path("video.mp4"),
    model: Annotated[str, typer.Option(help="A model's name, auto, or a folder in diffusers layout.")] = "auto",
    seed: Annotated[int, typer.Option(help="The same seed gives the same video.")] = 0,
    num_steps: Annotated[int, typer.Option(help="1 to 4.")] = 4,
    num_frames: Annotated[int | None, typer.Option(help="4n + 1; the model's own if left out.")] = None,
    resolution: Annotated[str | None, typer.Option(help="480p, 720p or WIDTHxHEIGHT.")] = None,
    aspect_ratio: Annotated[str | None, typer.Option(help="1:1, 4:3, 3:4, 16:9 or 9:16, with 480p or 720p.")] = None,
    sigma_max: Annotated[float | None, typer.Option(help="First noise level; larger is sharper, less diverse.")] = None,
    ode: Annotated[bool, typer.Option("--ode", help="Sample the ODE: sharper, less robust.")] = False,
    attention_type: Annotated[str, typer.Option(help="sla or original (dense).")] = "sla",
    sla_topk: Annotated[float | None, typer.Option(help="Share of key blocks that SLA attends to.")] = None,
    noise_device: Annotated[str, typer.Option(help="cpu: the same clip everywhere; cuda: upstream's seeds.")] = "cpu",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Make a video from a prompt."""
    from . import catalog, media, pipeline

    settings = {
        "num_frames": num_frames, "num_steps": num_steps, "seed": seed, "resolution": resolution,
        "aspect_ratio": aspect_ratio, "sigma_max": sigma_max, "ode": ode, "noise_device": noise_device,
    }  # fmt: skip
    pipeline.check_settings(catalog.find(model), prompt, **settings)
    media.check_output(save_path)

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:8}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("load", total=None)
        loaded = pipeline.load_pipeline(model, attention_type=attention_type, sla_topk=sla_topk, device=device)
        video = pipeline.generate(
            loaded,
            prompt,
            **settings,
            on_stage=lambda name: progress.reset(bar, description=name, total=num_steps if name == "denoise" else None),
            on_step=lambda done, total, latents: progress.update(bar, completed=done),
        )
        progress.reset(bar, description="write", total=None)
        begin = time.perf_counter()
        video.save(save_path)
    timings = video.timings | {"write": time.perf_counter() - begin}
    frames, height, width, _ = video.frames.shape
    print(f"{save_path}: {frames} frames of {width}x{height} at {video.fps} fps, seed {seed}")
    print("  ".join(f"{name} {seconds:.2f} s" for name, seconds in timings.items()))


@app.command()
def info(file: Annotated[Path, typer.Argument(help="An mp4 that turbo-nb made.")]) -> None:
    """Print how a video was made."""
    from . import media

    for name, value in media.read_metadata(file).items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        print(f"{name:15} {value}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, to paste or to parse.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 on warnings.")] = False,
) -> None:
    """Check this machine: what runs here, on what, and what to mend. Exit code 2 where nothing can run."""
    from . import preflight

    report = preflight.doctor()
    if as_json:
        import json

        print(json.dumps(report.to_dict(), indent=2))
    else:
        from rich import print as rich_print

        rich_print(report)
    raise typer.Exit(report.exit_code(strict))


def download(
    model: Annotated[str, typer.Argument(help="A model's name.")],
    quant: Annotated[bool, typer.Option("--quant", help="The files with int8 linears.")] = False,
) -> None:
    """Fetch a model's files into the Hub cache ($HF_HOME): the plan, the transfer, and where they lie."""
    from . import catalog, download

    spec = catalog.find(model)
    planned = download.plan(spec, quantised=quant)
    print(planned, flush=True)
    if planned.files:
        with download.progress_bars() as show:
            files = download.fetch(spec, quantised=quant, planned=planned, on_progress=show)
        print(files)


def main() -> None:
    """Entry point: a TurboNbError is one line on stderr and exit code 2, Ctrl-C exit code 130."""
    warnings.showwarning = _show_note
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own bar is on the screen
    try:
        app()
    except TurboNbError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("cancelled; nothing was written", file=sys.stderr)
        sys.exit(130)


def _show_note(message, category, filename, lineno, file=None, line=None) -> None:
    """Our own remarks are one line; other libraries' warnings are not for the user of a command."""
    if issubclass(category, UserWarning) and "turbo_nb" in filename:
        print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
