"""The command line: `python -m benchmarks`."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from turbo_nb.errors import InputError, TurboNbError

app = typer.Typer(
    help="Speed as rows of CSV, each behind its correctness check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Csv = Annotated[
    Path | None, typer.Option("--csv", help="The file that gets the rows. Without it they are only printed.")
]
Modes = Annotated[str, typer.Option("--mode", help="One or more, separated by commas.")]
Size = Annotated[str, typer.Option(help="WIDTHxHEIGHTxFRAMES in pixels.")]
CheckSize = Annotated[str, typer.Option(help="The clip of the correctness check.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Runs = Annotated[int, typer.Option(min=1, help="Number of timed calls. The median counts.")]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs that share the work. step and vae measure one GPU, too.")]
Warmup = Annotated[int, typer.Option(min=0, help="Calls between the first call and the timed calls.")]


@app.command()
def step(
    model: Annotated[str, typer.Option(help="1.3B, 14B, nano or tiny.")] = "1.3B",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Number of layers, from the first on. Default: all.")
    ] = None,
    size: Size = "832x480x81",
    attention: Annotated[str, typer.Option(help="sla, sagesla or original (dense).")] = "sla",
    topk: Annotated[float, typer.Option(help="Share of key blocks that SLA attends to.")] = 0.1,
    linears: Annotated[str, typer.Option(help="bf16 or int8.")] = "bf16",
    mode: Modes = "eager",
    check_layers: Annotated[int, typer.Option(min=1, help="Layers of the correctness check.")] = 2,
    check_size: CheckSize = "832x480x5",
    runs: Runs = 5,
    warmup: Warmup = 2,
    gpus: Gpus = 1,
    experts: Annotated[
        bool, typer.Option("--experts", help="All steps of a clip with two experts: one or both on each of 2 GPUs.")
    ] = False,
    device: Device = "auto",
    csv: Csv = None,
) -> None:
    """Measure one step of a transformer with random weights. Modes: reference, eager, fused, compile, fused+compile."""
    from turbo_nb.machine.probe import device_of

    from . import harness
    from . import step as benchmark

    device = device_of(device)
    setup = benchmark.Setup(
        model=model, layers=layers, size=clip(size), attention=attention, topk=topk, linears=linears, device=device
    )
    if experts:
        from . import experts as apart

        apart.check(gpus, device)
        jobs = apart.jobs(setup, gpus, runs=runs, warmup=warmup)
    elif gpus > 1:
        from . import gpus as several

        several.check(gpus, device)
        jobs = several.step_jobs(setup, gpus, runs=runs, warmup=warmup)
    else:
        jobs = benchmark.jobs(
            setup, mode.split(","), check_layers=check_layers, check_size=clip(check_size), runs=runs, warmup=warmup
        )
    raise typer.Exit(harness.run(jobs, device, csv))


@app.command()
def kernels(
    only: Annotated[str | None, typer.Option(help="Operations, separated by commas. Default: all.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="TOKENSxHEADSxHEAD_DIM, or ROWSxINxOUT of a linear. Default: those of 1.3B.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    runs: Runs = 20,
    warmup: Warmup = 3,
    device: Device = "auto",
    csv: Csv = None,
) -> None:
    """Measure the reference of each operation, and its kernels."""
    from turbo_nb.machine.probe import device_of

    from . import harness
    from . import kernels as benchmark

    device = device_of(device)
    jobs = benchmark.jobs(only and only.split(","), shape, dtype, device, runs=runs, warmup=warmup)
    raise typer.Exit(harness.run(jobs, device, csv))


@app.command()
def vae(
    size: Size = "832x480x81",
    vae: Annotated[Path | None, typer.Option(help="Wan2.1_VAE.pth, or a folder. Default: random weights.")] = None,
    base_dim: Annotated[int, typer.Option(help="Width of the VAE with random weights. Wan2.1 has 96.")] = 96,
    encode: Annotated[bool, typer.Option("--encode", help="Encode a clip instead of decoding one.")] = False,
    mode: Modes = "eager",
    check_size: CheckSize = "256x128x5",
    runs: Runs = 3,
    warmup: Warmup = 1,
    gpus: Gpus = 1,
    device: Device = "auto",
    csv: Csv = None,
) -> None:
    """Measure decoding of random latents, or encoding. Modes: eager, channels_last, fused."""
    from turbo_nb.machine.probe import device_of

    from . import harness
    from . import vae as benchmark

    device = device_of(device)
    if gpus > 1:
        from . import gpus as several

        several.check(gpus, device)
        jobs = several.vae_jobs(clip(size), gpus, base_dim=base_dim, runs=runs, warmup=warmup)
        raise typer.Exit(harness.run(jobs, device, csv))
    jobs = benchmark.jobs(
        clip(size), mode.split(","), vae, encoding=encode, base_dim=base_dim, check_size=clip(check_size),
        device=device, runs=runs, warmup=warmup,
    )  # fmt: skip
    raise typer.Exit(harness.run(jobs, device, csv))


@app.command()
def switch(
    gb: Annotated[float, typer.Option(help="Size of each of the two experts.")] = 14.0,
    mode: Modes = "accelerate,turns,ahead",
    runs: Runs = 3,
    warmup: Warmup = 0,
    device: Device = "auto",
    csv: Csv = None,
) -> None:
    """Measure the switch from one expert on the GPU to the other. Modes: accelerate, turns, ahead."""
    from turbo_nb.machine.probe import device_of

    from . import harness
    from . import switch as benchmark

    device = device_of(device)
    jobs = benchmark.jobs(gb, mode.split(","), device, runs=runs, warmup=warmup)
    raise typer.Exit(harness.run(jobs, device, csv))


@app.command()
def lora(
    model: Annotated[str, typer.Option(help="1.3B, 14B, nano or tiny.")] = "1.3B",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Number of layers, from the first on. Default: all.")
    ] = None,
    size: Size = "832x480x81",
    topk: Annotated[float, typer.Option(help="Share of key blocks that SLA attends to.")] = 0.1,
    linears: Annotated[str, typer.Option(help="bf16 or int8.")] = "bf16",
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")] = 32,
    mode: Modes = "base,merge,branch",
    check_layers: Annotated[int, typer.Option(min=1, help="Layers of the correctness check.")] = 2,
    check_size: CheckSize = "832x480x5",
    runs: Runs = 5,
    warmup: Warmup = 2,
    device: Device = "auto",
    csv: Csv = None,
) -> None:
    """Measure a step with a LoRA, and a change of its strength. Modes: base (without one), merge, branch."""
    from turbo_nb.machine.probe import device_of

    from . import harness, step
    from . import lora as benchmark

    device = device_of(device)
    setup = step.Setup(
        model=model, layers=layers, size=clip(size), attention="sla", topk=topk, linears=linears, device=device
    )
    jobs = benchmark.jobs(
        setup, rank, mode.split(","), check_layers=check_layers, check_size=clip(check_size), runs=runs, warmup=warmup
    )
    raise typer.Exit(harness.run(jobs, device, csv))


@app.command()
def e2e(
    model: Annotated[str, typer.Option(help="A model's name, a checkpoint or a diffusers folder.")] = "nano",
    random: Annotated[
        str | None, typer.Option(help="Random weights of a shape instead of a model: 1.3B, 14B, nano or tiny.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to show. Default: the example of the model.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHTxFRAMES. Default: the model's own.")] = None,
    steps: Annotated[int, typer.Option(help="1 to 4.")] = 4,
    attention: Annotated[str, typer.Option(help="sla, sagesla or original (dense).")] = "sla",
    topk: Annotated[float | None, typer.Option(help="Share of key blocks. Default: the model's own.")] = None,
    linears: Annotated[str, typer.Option(help="bf16, int8, or auto: the file's own.")] = "auto",
    memory: Annotated[
        float | None, typer.Option(help="Plan as for a GPU with so many GB. Default: keep everything loaded.")
    ] = None,
    runs: Runs = 3,
    warmup: Warmup = 1,
    gpus: Gpus = 1,
    device: Device = "auto",
    csv: Csv = None,
) -> None:
    """Measure a clip from the prompt to the mp4, with a loaded model."""
    from turbo_nb.machine.probe import device_of

    from . import e2e as benchmark
    from . import harness

    device = device_of(device)
    made = {"num_steps": steps}
    if size:
        width, height, frames = clip(size)
        made |= {"resolution": f"{width}x{height}", "num_frames": frames}
    quant_linear = {"auto": "auto", "int8": True, "bf16": False}
    if linears not in quant_linear:
        raise InputError(f"linears is {linears!r}. Expected one of {', '.join(quant_linear)}.")
    load = {"attention_type": attention, "sla_topk": topk, "quant_linear": quant_linear[linears]}
    load |= {"clip": clip(size)} if size else {}
    if memory is not None and not memory > 0:
        raise InputError(f"memory is {memory:g}. Expected GB, above 0.")
    memory = None if memory is None else memory * 1e9
    load |= {"gpus": gpus}
    jobs = benchmark.jobs(model, random, prompt, device, load, made, memory=memory, runs=runs, warmup=warmup)
    raise typer.Exit(harness.run(jobs, device, csv))


@app.command()
def memory(
    model: Annotated[
        str, typer.Option(help="Shapes, separated by commas: 1.3B, 14B, A14B (two experts), tiny or tiny-i2v.")
    ] = "1.3B,14B,A14B",
    gb: Annotated[
        str | None, typer.Option(help="GB of GPU memory, separated by commas. Default: those of the README's table.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHTxFRAMES. Default: the model's own.")] = None,
    steps: Annotated[int, typer.Option(help="1 to 4.")] = 4,
    attention: Annotated[str, typer.Option(help="sla, sagesla or original (dense).")] = "sagesla",
    linears: Annotated[str, typer.Option(help="bf16 or int8.")] = "int8",
    runs: Runs = 1,
    device: Device = "auto",
    csv: Csv = None,
) -> None:
    """Run memory plans on a GPU that seems smaller: seconds and peaks of each stage, with random weights."""
    from turbo_nb.machine.probe import device_of

    from . import harness
    from . import memory as benchmark
    from . import step as steps_of

    device, names = device_of(device), model.split(",")
    for option, given, known in (("model", names, steps_of.MODELS), ("linears", [linears], steps_of.LINEARS)):
        for one in given:
            if one not in known:
                raise InputError(f"{option} is {one!r}. Expected one of {', '.join(known)}.")
    try:
        amounts = [float(one) for one in gb.split(",")] if gb else None
    except ValueError:
        amounts = [0.0]
    if amounts and not min(amounts) > 0:
        raise InputError(f"gb is {gb!r}. Expected GB above 0, separated by commas, such as 10,16,24.")
    load = {"attention_type": attention, "quant_linear": linears == "int8"}
    jobs = benchmark.jobs(names, device, load, {"num_steps": steps}, size and clip(size), amounts, runs=runs)
    raise typer.Exit(harness.run(jobs, device, csv))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def startup(
    context: typer.Context,
    mode: Modes = "cold,warm",
    runs: Runs = 3,
    device: Device = "auto",
    csv: Csv = None,
) -> None:
    """Measure turbo-nb t2v from the start of the process to the mp4, by phase. Other options go to turbo-nb t2v."""
    from turbo_nb.machine.probe import device_of

    from . import harness
    from . import startup as benchmark

    device = device_of(device)
    raise typer.Exit(harness.run(benchmark.jobs(context.args, device, mode.split(","), runs), device, csv))


@app.command()
def batch(
    actors: Annotated[
        str, typer.Option(help="Numbers of Ray's actors, separated by commas. 0: this process.")
    ] = "1,2,0",
    clips: Annotated[int, typer.Option(min=1, help="Measured clips. Two more for each actor come before them.")] = 8,
    frames: Annotated[int, typer.Option(help="Of a clip of nano, on a CPU.")] = 25,
    device: Device = "auto",
    csv: Csv = None,
) -> None:
    """Measure clips a minute of a batch. On GPUs: random weights of 1.3B's shape, 832x480, 81 frames."""
    from turbo_nb.machine.probe import device_of

    from . import batch as benchmark
    from . import harness

    device = device_of(device)
    counts = [int(one) for one in actors.split(",")]
    raise typer.Exit(harness.run(benchmark.jobs(device, counts, clips, frames), device, csv))


@app.command()
def table(file: Annotated[Path, typer.Argument(help="A CSV with rows.")]) -> None:
    """Print the latest row of each work, shape and mode as a Markdown table."""
    from . import harness

    print(harness.table(harness.read(file)))


def clip(size: str) -> tuple[int, int, int]:
    """Return (832, 480, 81) for "832x480x81". Raises InputError for a size that a clip cannot have."""
    from turbo_nb import catalog, settings

    match = re.fullmatch(r"(\d+x\d+)x(\d+)", size)
    if not match or int(match[2]) % 4 != 1:
        raise InputError(f"size is {size!r}. Expected WIDTHxHEIGHTxFRAMES with 4n + 1 frames, such as 832x480x81.")
    return *settings.size_of(catalog.NANO, match[1], None), int(match[2])


def main() -> None:
    """Run a command. A TurboNbError becomes one line on stderr and exit code 2. A failed check becomes exit code 1."""
    try:
        app()
    except TurboNbError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
