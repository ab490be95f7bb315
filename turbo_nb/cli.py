"""turbo-nb: the command line. Underscore and dash spellings of an option are the same."""

import filecmp
import inspect
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer
from rich.markup import escape

from . import terminal
from .errors import (
    LONGEST,
    InputError,
    OutputError,
    first_line,
    listed,
    presentable,
    without_secrets,
)
from .settings import ClipSettings, LoadOptions, RunOptions, build, options, seeds
from .values import local

PANELS = {"clip": "Clip", "model": "Model", "memory": "Memory", "output": "Output", "advanced": "Advanced"}

# What stands for a value in the help. It is short, because names of 24 characters and texts have to fit 80 columns.
METAVARS = {bool: "", Path: "PATH", int: "INT", float: "NUM"}

UsageError = typer.BadParameter.__mro__[1]  # click's, which newer versions of typer carry with them


class _Commands(typer.core.TyperGroup):
    """The commands, whose errors of usage quote no more of an argument than a terminal can show"""

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        with _short_usage_errors():
            return super().make_context(*arguments, **more)

    def invoke(self, context: Any) -> Any:
        with _short_usage_errors():
            return super().invoke(context)


@contextmanager
def _short_usage_errors() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        error.message = presentable(" ".join(without_secrets(error.message)[: LONGEST * 2].split()), 300)
        raise


app = typer.Typer(
    cls=_Commands,
    help="TurboDiffusion video models, from wheels alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, to paste or to parse.")]


def _print_version(asked: bool) -> None:
    if asked:
        from .machine import environment

        print(f"turbo-nb {environment.version('turbo-nb') or '(not installed, used from a folder)'}")
        raise typer.Exit


@app.callback()
def turbo_nb(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """TurboDiffusion video models, from wheels alone."""


def _parameter(name: str, cls: type, default: Any) -> inspect.Parameter:
    """Return typer's parameter for an option of settings.py"""
    option, kind = options(cls)[name], options(cls)[name].check.type
    flags = [option.flag] if option.flag else [f"--{name.replace('_', '-')}"] if kind is bool else []
    if name == "quant_linear":  # "auto" is what leaving it out means
        kind, default, flags = bool, None, ["--quant-linear/--no-quant-linear"]
    words = getattr(option.check, "words", ()) if get_origin(kind) is Literal else ()
    text = " ".join([option.help, *([f"One of {', '.join(words)}."] if words else [])])
    made = typer.Option(
        *flags, help=escape(text), rich_help_panel=PANELS[option.group], metavar=METAVARS.get(kind, "TEXT")
    )
    kind = str if kind is Path else kind  # because Path turns "" into the current folder, and // into /
    required = default is MISSING
    if default == ():  # a list, which typer leaves out as None
        default = None
    if default is None:
        kind = kind | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[kind, made],
    )


def _panel(parameter: inspect.Parameter) -> int:
    """Return the place of a parameter's panel in the help, −1 for one outside the panels"""
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return [*PANELS.values()].index(panel) if panel in PANELS.values() else -1


def command(*classes: type, skip: tuple[str, ...] = (), **defaults: Any) -> Callable:
    """Register a command whose options are those that some classes of settings.py declare.

    Args:
        classes: of options. The function's first parameters receive one instance of each; or a dictionary of the
            values, for a class one of whose required options is skipped.
        skip: options that the command does not have.
        defaults: values to use in place of the declared defaults; MISSING makes an option required.
    """
    declared = {
        name: (cls, defaults.get(name, one.default))
        for cls in classes
        for name, one in cls.__dataclass_fields__.items()
        if name not in skip
    }
    partial = {
        cls for cls in classes for n, one in cls.__dataclass_fields__.items() if n in skip and one.default is MISSING
    }

    def decorate(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters.values())
        takes, own = parameters[: len(classes)], parameters[len(classes) :]

        def run(**given: Any) -> None:
            built = {}
            for parameter, cls in zip(takes, classes, strict=True):
                values = {name: given.pop(name) for name, (owner, _) in declared.items() if owner is cls}
                values = {name: _scaled(cls, name, value) for name, value in values.items() if value is not None}
                built[parameter.name] = values if cls in partial else build(cls, values)
            _check_variables()
            function(**built, **given)

        made = [*own, *(_parameter(name, *declared[name]) for name in declared)]
        made.sort(key=_panel)  # because the panels stand in the order of their first options
        run.__signature__ = inspect.Signature([one.replace(kind=one.KEYWORD_ONLY) for one in made])
        run.__annotations__ = {one.name: one.annotation for one in made}
        run.__doc__ = function.__doc__
        app.command(function.__name__)(run)
        return function

    return decorate


def _check_variables() -> None:
    """Raise TurboNbError for a variable with an unusable value, before anything is downloaded"""
    from . import backends

    backends.check_variables()


def _scaled(cls: type, name: str, value: Any) -> Any:
    """Return a value in the unit that the option has in Python, checked in the unit of the command line"""
    option = options(cls)[name]
    return option.check(name, value) * option.scale if option.scale else value


def _path(text: str) -> Path:
    """Return an argument as a path. "" is an unset variable of a script, and not the current folder"""
    if not text:
        raise typer.BadParameter("'' is not a path. Is a variable of the shell empty?")
    try:
        return Path(local(text))
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


HighNoise = Annotated[
    str | None,
    typer.Option("--high-noise-model-path", help="The high-noise expert.", rich_help_panel="Model", metavar="PATH"),
]
LowNoise = Annotated[
    str | None,
    typer.Option("--low-noise-model-path", help="The low-noise expert.", rich_help_panel="Model", metavar="PATH"),
]
DefaultNorm = Annotated[
    bool, typer.Option("--default-norm", help="Upstream's flag; the norms here are always the plain ones.", hidden=True)
]
Timing = Annotated[
    bool, typer.Option("--timing", help="Print the seconds of each phase, from the start of the process.")
]

Rewrite = Annotated[
    bool,
    typer.Option(
        "--rewrite",
        help="Let the language model at TURBO_NB_REWRITE_URL write a long English prompt first.",
        rich_help_panel="Clip",
    ),
]


@command(ClipSettings, LoadOptions, RunOptions,
         skip=("image", "last_image", "adaptive_resolution", "boundary", "extend", "extend_clip", "text_cache",
               "output_dir", "workers", "ray_address"))  # fmt: skip
def t2v(
    clip: ClipSettings,
    load: LoadOptions,
    run: RunOptions,
    rewrite: Rewrite = False,
    default_norm: DefaultNorm = False,
    timing: Timing = False,
) -> None:
    """Make a video from a prompt."""
    _make(clip, load, run, rewrite, timing)


@command(ClipSettings, LoadOptions, RunOptions, model="Wan2.2-A14B",
         skip=("checkpoint", "text_cache", "output_dir", "workers", "ray_address"))  # fmt: skip
def i2v(
    clip: ClipSettings,
    load: LoadOptions,
    run: RunOptions,
    high_noise_model: HighNoise = None,
    low_noise_model: LowNoise = None,
    rewrite: Rewrite = False,
    default_norm: DefaultNorm = False,
    timing: Timing = False,
) -> None:
    """Make a video from a picture and a prompt, or continue one (--extend_clip)."""
    if clip.image is None and clip.extend_clip is None:
        raise InputError("--image_path is missing. Expected a picture, or an mp4 to continue (--extend_clip).")
    _make(clip, _with_experts(load, high_noise_model, low_noise_model), run, rewrite, timing)


def _with_experts(load: LoadOptions, high: str | None, low: str | None) -> LoadOptions:
    """Return the options with two experts as their checkpoint"""
    if (high is None) != (low is None):
        missing = "--low_noise_model_path" if high else "--high_noise_model_path"
        raise InputError(f"{missing} is missing. Expected both experts, or none of them.")
    if high is not None and load.checkpoint is not None:
        raise InputError(f"--dit_path is {str(load.checkpoint)!r}. Expected none beside the two experts.")
    return load if high is None else replace(load, checkpoint=(high, low))


def _make(clip: ClipSettings, load: LoadOptions, run: RunOptions, rewrite: bool, timing: bool) -> None:
    """Make the clips of one prompt"""
    from .machine import phases, probe
    from .machine.garbage import uncollected

    phases.mark("start Python")
    probe.begin()  # beside the imports
    with uncollected():
        from . import generation, pipeline, preparation
        from .machine import atomic
        from .video import mp4, sheet

    seeds(clip.seed, run.num_samples + (clip.extend or 0))  # because the parts of the last sample count on
    every = seeds(clip.seed, run.num_samples)
    path = Path(run.save_path)
    paths = [path] if run.num_samples == 1 or run.grid else [path.with_stem(f"{path.stem}-{seed}") for seed in every]
    phases.mark("import")
    resolved, prepared = preparation.preflight(clip, load, paths, columns=run.num_samples if run.grid else 1)
    phases.mark("resolve")
    atomic.sweep(os.path.dirname(os.path.realpath(path)))
    with _progress() as (progress, bar, console):
        original, clip = clip.prompt, _rewritten(clip, resolved.spec, progress, bar) if rewrite else clip
        loaded = pipeline.load(
            resolved,
            clip=prepared.clip.size,
            prompts=[clip.prompt],
            on_plan=lambda plan: plan.name == "resident" or console.print(str(plan)),
            on_progress=_shows_download(progress, bar),
            on_compile=lambda done, total: progress.update(bar, description="compile", completed=done, total=total),
        )
        if outlook := generation.outlook(pipeline.LoadedModel.of(loaded), prepared.clip):
            console.print(f"a video takes {outlook}")

        def make(seed: int, encoder: mp4.Encoder | None = None) -> generation.Video:
            video = generation.generate(
                loaded,
                **vars(clip) | {"seed": seed},
                on_stage=lambda name: progress.reset(
                    bar, description=name, total=clip.num_steps if name == "denoise" else None
                ),
                on_step=lambda done, total, latents: progress.update(bar, completed=done),
                on_frames=encoder and encoder.add,
            )
            return replace(video, record=replace(video.record, original_prompt=original if rewrite else ""))

        def save(video: generation.Video, to: mp4.Encoder | Path) -> None:
            progress.reset(bar, description="write", total=None)
            begin = time.perf_counter()
            path = video.save(to)
            _report(path, video, {"write": time.perf_counter() - begin})
            phases.mark("clip")

        if run.grid:
            made: list[generation.Video] = []
            try:
                made.extend(map(make, every))  # one by one, so that a failure leaves those before it
            finally:
                if made:
                    record = replace(made[-1].record, seed=[*every[: len(made)]])
                    frames = sheet.grid([video.frames for video in made])
                    save(replace(made[-1], frames=frames, record=record), path)
        else:
            for seed, path in zip(every, paths, strict=True):
                with mp4.Encoder(path, resolved.spec.fps) as encoder:
                    save(make(seed, encoder), encoder)
    if timing:
        _print_phases(phases.seconds())


def _rewritten(clip: ClipSettings, spec: Any, progress: Any, bar: Any) -> ClipSettings:
    """Return a clip with a longer prompt, which is printed"""
    from .text.rewrite import rewrite_prompt

    progress.reset(bar, description="rewrite", total=None)
    clip = replace(clip, prompt=rewrite_prompt(clip.prompt, task=spec.task, vocabulary=spec.vocabulary))
    progress.reset(bar, description="load", total=None)
    _say(f"prompt: {clip.prompt}")
    return clip


def _print_phases(seconds: dict[str, float]) -> None:
    """Print the seconds of each phase on stderr"""
    for name, value in (seconds | {"all": sum(seconds.values())}).items():
        print(f"{value:8.2f} s  {name}", file=sys.stderr)


def _say(what: Any) -> None:
    """Print a result at once. Text of a path or a file cannot command the terminal, because names may have escapes"""
    print(presentable(str(what), 10_000_000), flush=True)


@contextmanager
def _progress(hidden: bool = False) -> Iterator[tuple]:
    """Draw one bar on stderr; gives rich's progress, the bar, and the console"""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:8}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    disable = hidden and not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        yield progress, progress.add_task("load", total=None), progress.console


def _shows_download(progress, bar) -> Callable:
    def show(fetched) -> None:
        progress.update(bar, description=fetched.stage, completed=fetched.done, total=fetched.total)

    return show


def _report(path: Path, video, more: dict[str, float]) -> None:
    """Print where a clip is, and the seconds and the peak memory of its stages"""
    from .machine import environment

    frames, height, width, _ = video.frames.shape
    made = ", ".join(filter(None, [_seeds(video.record.seed), video.record.several_gpus]))
    _say(f"{path}: {frames} frames of {width}x{height} at {video.fps} fps, {made}")
    timings, parts = video.timings | more, []
    for stage, seconds in timings.items():
        details = [f"{video.peaks[stage] / 1e9:.1f} GB"] if video.peaks.get(stage) else []
        if stage == "denoise":
            details.append("steps " + " ".join(f"{step:.2f}" for step in video.steps))
        parts.append(f"{stage} {seconds:.2f} s" + (f" ({'; '.join(details)})" if details else ""))
    _say("  ".join(parts) + environment.dollars(environment.cost(sum(timings.values())), "  "))


def _seeds(seed: int | list[int]) -> str:
    """Return the seed of a clip, or those of a grid, which are consecutive"""
    first, last = (seed[0], seed[-1]) if isinstance(seed, list) else (seed, seed)
    return f"seed {first}" if first == last else f"seeds {first} to {last}"


@command(LoadOptions, ClipSettings, RunOptions, skip=("prompt", "extend_clip", "text_cache", "save_path", "grid"))
def batch(
    load: LoadOptions,
    settings: dict,
    run: RunOptions,
    prompts: Annotated[
        Path,
        typer.Argument(help="txt (a prompt a line), csv or jsonl (rows with their own settings).", parser=_path),
    ],
    high_noise_model: HighNoise = None,
    low_noise_model: LowNoise = None,
    default_norm: DefaultNorm = False,
) -> None:
    """Make a video from every prompt of a file. Started again, it makes what is missing. Exit code 1 if any failed."""
    from . import batch

    made = 0
    try:
        with _progress(hidden=True) as (progress, bar, _):

            def show(record, number: int, total: int) -> None:
                nonlocal made
                made += record.status == "done"
                _say(f"{number}/{total}  {batch.describe(record)}")

            summary = batch.run(
                prompts,
                _with_experts(load, high_noise_model, low_noise_model),
                run.output_dir,
                workers=run.workers,
                ray_address=run.ray_address,
                num_samples=run.num_samples,
                on_record=show,
                on_status=lambda status: progress.update(
                    bar, description=str(status), completed=status.done + status.failed, total=status.total
                ),
                on_progress=_shows_download(progress, bar),
                **settings,
            )
    except KeyboardInterrupt:
        print(f"cancelled; {made} made, which stay: the same command makes the rest", file=sys.stderr)
        raise terminal.Cancelled from None
    _say(summary)
    raise typer.Exit(int(bool(summary.failures)))


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="An mp4 that turbo-nb made, a checkpoint or a LoRA.", parser=_path)],
) -> None:
    """Print how a video was made, or what a checkpoint or a LoRA is."""
    if file.suffix.lower() == ".mp4":
        from .video import mp4

        for name, value in mp4.read_metadata(file).items():
            _say(mp4.printable(f"{name:15} {_as_text(value)}"))
    else:
        from .files import lora

        _say(lora.describe(file))
    _require_shown()


def _as_text(value: Any) -> str:
    """Return a value of a record in one line"""
    try:
        if isinstance(value, dict):
            return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
        if isinstance(value, list):
            return ("; " if any(isinstance(item, dict) for item in value) else ", ").join(map(_as_text, value))
        return str(value)
    except RecursionError:  # a foreign file may nest as deeply as JSON can be read
        return "…"


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint: transformer, VAE or text encoder.", parser=_path)],
    folder: Annotated[Path, typer.Argument(help="The diffusers folder to write it into.", parser=_path)],
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:STRENGTH to merge first; may be repeated.")
    ] = None,
    low_noise: Annotated[
        bool, typer.Option("--low-noise", help="The transformer is an image-to-video model's low-noise expert.")
    ] = False,
) -> None:
    """Write a checkpoint as a part of a diffusers folder (safetensors). LoRAs can be merged into a transformer."""
    from .files import locate
    from .files.convert import convert

    asked = options(LoadOptions)["loras"].check("lora", lora or ())

    _say(convert(source, folder, loras=locate.local_loras(asked), low_noise=low_noise))


@app.command()
def doctor(
    as_json: AsJson = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 on warnings.")] = False,
) -> None:
    """Check this machine: what runs here, on what, and what to fix. Exit code 2 where nothing can run."""
    from .checkup.doctor import doctor

    report = doctor()
    _show(report, as_json)
    raise typer.Exit(report.exit_code(strict))


@app.command()
def download(
    model: Annotated[
        str,
        typer.Argument(help="A model's name, auto (the best that fits), or a Hub id such as owner/repo/file@rev."),
    ],
    quant: Annotated[
        bool | None,
        typer.Option("--quant/--no-quant", help="The int8 files or the bf16 ones; else those that suit this GPU."),
    ] = None,
) -> None:
    """Download a model's files into the Hub cache ($HF_HOME): print the plan, the transfer, and the paths."""
    from .files.download import download_model

    _check_variables()
    files = download_model(model, quantized=quant, on_plan=_say)
    if files:
        _say(files)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A model's name; a released one must have been downloaded.")] = "nano",
    quant: Annotated[bool, typer.Option("--quant", help="The files with int8 linears.")] = False,
    device: Annotated[str, typer.Option(help=options(LoadOptions)["device"].help)] = "auto",
    as_json: AsJson = False,
) -> None:
    """Test this machine and a model: operations, files, a step, a short clip. Exit code 2 where something is wrong."""
    from .checkup.selftest import verify

    _check_variables()
    result = verify(model, quantized=quant, device=device)
    _show(result, as_json)
    raise typer.Exit(result.exit_code)


@app.command()
def ui(
    folder: Annotated[Path, typer.Argument(help="Where the clips are kept.", metavar="FOLDER", parser=_path)] = Path(
        "outputs"
    ),
    model: Annotated[str, typer.Option(help="The model chosen at first.", metavar="TEXT")] = "auto",
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.", metavar="TEXT")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.", metavar="INT")] = 8866,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Open the generator as a page of its own. It asks for JUPYTER_TOKEN or JUPYTER_PASSWORD, as JupyterLab does."""
    from .generator import standalone

    standalone.serve(
        folder, model=model, host=host, port=port, browser=browser,
        on_address=lambda address: _say(f"the generator: {address}\nCtrl-C ends it"),
    )  # fmt: skip


@app.command()
def notebooks(
    folder: Annotated[Path, typer.Argument(help="Where to copy them.", metavar="FOLDER", parser=_path)],
) -> None:
    """Copy the notebooks of this version into a folder. Files that are there and differ are an error."""
    from .machine import atomic

    shipped = Path(__file__).parent / "assets" / "notebooks"  # of a wheel; a checkout has them beside the package
    paths = sorted((shipped if shipped.exists() else Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
    if not paths:
        raise InputError(f"{shipped} does not exist. Expected the notebooks. Install turbo-nb again.")
    try:
        new = [path for path in paths if not os.path.lexists(folder / path.name)]
        # a pipe or a device differs, and reading it may never end
        changed = [p.name for p in paths if p not in new and not filecmp.cmp(p, folder / p.name, shallow=False)]
        for path in [] if changed else new:
            atomic.write(folder / path.name, path.read_bytes())
            _say(folder / path.name)
    except (OSError, ValueError) as error:  # ValueError for a name with a null byte
        reason = first_line(error)
        raise OutputError(
            f"{str(folder)!r} cannot take the notebooks ({reason}). Expected a folder. Take another one."
        ) from error
    if changed:
        raise InputError(
            f"{listed(changed)} in {str(folder)!r} differs from this version's. "
            "Expected no such file, or an unchanged one. Take another folder, or move the file away."
        )


@app.command("run", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run_script(
    script: Annotated[str, typer.Argument(help="Path of the script.", metavar="SCRIPT")],
    arguments: Annotated[list[str] | None, typer.Argument(help="What the script gets.", metavar="ARGS")] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as with python -m.")] = False,
) -> None:
    """Run upstream's own script, unmodified, with nothing compiled."""
    from .shims import script as scripts

    if not sys.flags.safe_path:
        del sys.path[0]  # because it is the folder of turbo-nb, not of the script
    sys.excepthook = scripts.show_exception
    warnings.showwarning = terminal.show_script_warning
    with redirect_stdout(sys.__stdout__), redirect_stderr(sys.__stderr__):  # because a script may want a terminal
        scripts.execute(script, arguments or [], module)


def _show(report, as_json: bool) -> None:
    """Print a report as JSON or as tables"""
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        from rich import print as rich_print

        rich_print(report)
    _require_shown()


def _require_shown() -> None:
    """Exit with 1 where stdout did not take the text, for commands whose only result is the text"""
    if sys.stdout is not None:
        sys.stdout.flush()
    if getattr(sys.stdout, "error", None):
        raise typer.Exit(1)


def main() -> None:
    """Run a command, as `terminal.run` says."""
    terminal.run(app)


def run() -> None:
    """Run a command as a process of its own."""
    terminal.run_and_end(app)


if __name__ == "__main__":
    run()
