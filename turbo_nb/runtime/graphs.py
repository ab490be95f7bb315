"""CUDA graphs of a denoising step: hundreds of launches are recorded once, and later steps launch them as one.

    first clip of a shape        plain; it compiles kernels, and its peak of memory is measured
    first step of the second     recorded as two graphs: the prompt's part, and the step
    first step of every clip     the prompt's graph, then the step's
    every other step             the step's graph

Recording takes 0.04 to 0.2 s (H100), which is more than one clip saves where the GPU is the bottleneck. So the first
clip of a shape is plain.

A graph replays kernels with the addresses and numbers that they had. So the latents, the timestep and the prompt are
copied into the tensors that it was recorded with. What else decides the kernels (weights' addresses, modules, top-k,
TURBO_NB variables) is the graph's key. Kernels and their order are those of the plain step, so the bits are, too.

All graphs of a model share one pool of memory. A graph may therefore overwrite what another one has left there. Only
the prompt's part outlives a replay, so it is replayed again whenever another graph ran in between.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from .. import backends
from ..errors import first_line
from ..fused import transformer as fused_transformer
from ..machine import environment
from ..machine.garbage import uncollected
from ..sla import SLAProcessor
from .plan import USABLE, Plan
from .steps import Tally

MOST = 4  # graphs of a model; the least recently used one is dropped
SPARE = 1.1  # memory of a graph over that of a plain step, because its pool shares nothing with other work
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Recorder(Protocol):
    """What records graphs; tests have one for the CPU."""

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record what `work` launches. Returns a function that launches it again, and what `work` returned."""

    def used(self, peak: bool = False) -> int:
        """Return the bytes in use; with `peak` the most since the stage began."""

    def room(self, wanted: float) -> float:
        """Return the bytes that a graph can allocate; give cached memory back if they are less than wanted."""

    def release(self) -> None:
        """Give the memory of dropped graphs back."""


class CudaRecorder:
    """Records CUDA graphs on one GPU."""

    def __init__(self, device: str | torch.device):
        self._device = torch.device(device)
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self._stream):  # so that cuBLAS' workspace of this stream is not part of a graph's pool
            x = torch.zeros(16, 16, device=device, dtype=torch.bfloat16)
            torch._addmm_activation(x[0], x, x, use_gelu=True).mm(x)

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """As in `Recorder`. The work runs on a stream of its own and computes nothing."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        # because freeing another graph or a pinned tensor would end the recording
        with uncollected(), torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay, result

    def used(self, peak: bool = False) -> int:
        """As in `Recorder`."""
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(self._device)

    def room(self, wanted: float) -> float:
        """As in `Recorder`. A graph's pool cannot use memory that torch has cached for other work."""
        if (free := torch.cuda.mem_get_info(self._device)[0]) >= wanted:
            return free
        torch.cuda.empty_cache()  # slow, because it waits for the GPU
        return torch.cuda.mem_get_info(self._device)[0]

    def release(self) -> None:
        """As in `Recorder`."""
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


@dataclass(kw_only=True)
class _Graph:
    """A recorded step: the tensors that it reads and writes."""

    key: tuple
    model: nn.Module
    latents: Tensor
    timestep: Tensor
    text: Tensor
    replay_prompt: Callable[[], None]
    replay: Callable[[], None]
    output: Tensor
    held: list = field(repr=False)  # what the step reads beside its inputs
    prepared_for: Tensor | None = None  # the prompt that the prompt's graph ran for


class StepGraphs:
    """The graphs of a model's transformers.

    Args:
        recorder: returns what records graphs on a device.
    """

    def __init__(self, recorder: Callable[[str], Recorder] = CudaRecorder):
        self._make, self._recorder = recorder, None
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._needs: dict[tuple, float] = {}  # key of a shape that ran → bytes of its activations
        self._refused: dict[tuple, str] = {}  # key → why it cannot be recorded
        self._states: dict[int, tuple[tuple, int]] = {}  # id of a transformer → its signature, and the number of it
        self._out_of_memory = False
        self._last: _Graph | None = None

    @contextmanager
    def replacing(
        self, models: Sequence[nn.Module], plan: Plan, tally: Tally, *,
        later: float = 0, on_begin: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:  # fmt: skip
        """Let graphs compute the forwards of some transformers inside this context, where they fit.

        Args:
            models: whose `forward` is replaced.
            plan: the memory plan in effect.
            tally: gets what happened.
            later: bytes that later stages allocate beside the model. They stay free.
            on_begin: called before a graph is launched, in place of the hooks inside the transformer.
        """
        tally.reason = _agreed(models[0], unfit(models, plan) or "")
        if tally.reason:
            self.release()
            yield
            return
        for graph in self._graphs.values():
            graph.prepared_for = None  # weights may have changed since
        with ExitStack() as stack:
            for model in models:
                run = _Run(self, model, plan, later, on_begin, tally)
                model.forward = run
                stack.callback(vars(model).pop, "forward")
            yield

    def state(self, model: nn.Module) -> tuple[int, int]:
        """Return what stands for a transformer's signature in a key. Drops the graphs of an earlier signature."""
        found, (known, number) = signature(model), self._states.get(id(model), (None, 0))
        if _agreed(model, "another signature" if found != known else ""):
            for key in [key for key, graph in self._graphs.items() if graph.model is model]:
                del self._graphs[key]
            number += 1
            self._states[id(model)] = found, number
        return id(model), number

    def release(self) -> bool:
        """Drop all graphs and return their memory. Returns whether a graph existed."""
        if not self._graphs:
            return False
        self._graphs.clear()
        self._last = None
        self._recorder.release()
        return True

    def out_of_memory(self) -> bool:
        """Drop all graphs and record no more, because memory ran out. Returns whether a graph existed."""
        self._out_of_memory = True
        return self.release()


class _Run:
    """The forward of one transformer in one run."""

    def __init__(
        self, graphs: StepGraphs, model: nn.Module, plan: Plan, later: float, on_begin: Callable, tally: Tally
    ):
        self._graphs, self._model, self._plan, self._later = graphs, model, plan, later
        self._on_begin, self._tally = on_begin, tally
        self.plain, self._state = model.forward, graphs.state(model)
        self._ulysses = getattr(model, "ulysses", None)  # where several ranks share the step
        self._known = set(graphs._needs)  # shapes of earlier runs

    def __call__(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **more: Any) -> Any:
        inputs = (hidden_states, timestep, encoder_hidden_states)
        if reason := _unusual(more):
            self._tally.reason = reason
            return self.plain(*inputs, **more)
        if not self._ulysses:
            return self._run(inputs, more)
        if not self._ulysses.can_share(self._model, hidden_states, timestep):  # something was attached since
            return self.plain(*inputs, **more)
        with self._ulysses.sharing(self._model, inputs, recorded=True):
            return self._run(inputs, more)

    def _run(self, inputs: tuple[Tensor, ...], more: dict) -> Any:
        """Run a step plainly, or as a graph"""
        key = (self._state, *((x.shape, x.dtype, x.device) for x in inputs))
        graph = self._graphs._graphs.get(key)
        if graph is None:
            graph = self._record(key, inputs)
        if graph is None:
            return self._measured(key, inputs, more)
        return (self._replay(graph, *inputs),)

    def _measured(self, key: tuple, inputs: tuple[Tensor, ...], more: dict) -> Any:
        """Run a plain step, and note the memory that it took"""
        recorder = self._graphs._recorder = self._graphs._recorder or self._graphs._make(self._plan.device)
        before = recorder.used()
        result = self.plain(*inputs, **more)
        self._graphs._needs.setdefault(key, max(0, recorder.used(peak=True) - before))
        return result

    @torch.inference_mode()
    def _record(self, key: tuple, inputs: tuple[Tensor, ...]) -> _Graph | None:
        """Record a step of a shape that an earlier run had; None for a new shape, and where it cannot be recorded"""
        graphs, model = self._graphs, self._model
        if key not in self._known:
            return None
        reason = graphs._refused.get(key) or ("memory ran out" if graphs._out_of_memory else self._too_large(key))
        reason, made, lost = _agreed(model, reason), None, ""
        if not reason:
            while len(graphs._graphs) >= MOST:
                graphs._graphs.popitem(last=False)
            latents, timestep, text = (x.clone(memory_format=torch.contiguous_format) for x in inputs)
            tables = model.rope.forward(latents)  # computed before, because they outlive the graph
            try:
                fused_transformer.forget_prompt(model)
                replay_prompt, kept = graphs._recorder.record(lambda: fused_transformer.prepare_prompt(model, text))
                replay, result = graphs._recorder.record(lambda: self.plain(latents, timestep, text, return_dict=False))
                made = _Graph(
                    key=key, model=model, latents=latents, timestep=timestep, text=text, replay_prompt=replay_prompt,
                    replay=replay, output=result[0], held=[kept, tables],
                )  # fmt: skip
            except torch.OutOfMemoryError:
                reason = lost = "memory ran out"
            except RuntimeError as error:  # a launch that a graph cannot hold
                reason = f"not recorded: {first_line(error)}"
            finally:
                fused_transformer.forget_prompt(model)  # because these tensors are recorded and not computed
            reason = _agreed(model, reason)
            if reason and _agreed(model, lost):  # on any rank, because all of them must have the same graphs
                graphs.out_of_memory()
        if not reason:
            graphs._graphs[key] = made
            self._tally.captured += 1
            return made
        graphs._refused[key] = self._tally.reason = reason
        return None

    def _too_large(self, key: tuple) -> str:
        """Say why a graph would take memory that later stages need; empty if it would not"""
        recorder, needs = self._graphs._recorder, SPARE * self._graphs._needs[key]
        if self._graphs._graphs:  # they share a pool, which has room for the largest of them
            needs = max(0, needs - SPARE * max(self._graphs._needs[other] for other in self._graphs._graphs))
        room = min(recorder.room(needs + self._later), self._plan.budget * USABLE - recorder.used())
        if needs + self._later <= room:
            return ""
        return (
            f"a graph takes {needs / 1e9:.1f} GB, later stages {self._later / 1e9:.1f}, and {room / 1e9:.1f} are free"
        )

    @torch.inference_mode()
    def _replay(self, graph: _Graph, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self._on_begin()
        graphs = self._graphs
        if graph.prepared_for is not text or graphs._last is not graph:
            graph.text.copy_(text)
            graph.replay_prompt()
            graph.prepared_for, graphs._last = text, graph
        graph.latents.copy_(latents)
        graph.timestep.copy_(timestep)
        graph.replay()
        self._tally.replayed += 1
        graphs._graphs.move_to_end(graph.key)
        return graph.output.clone()


def _agreed(model: nn.Module, reason: str) -> str:
    """Return a reason for other than a recorded step, which another rank may have; empty where no rank has one"""
    ulysses = getattr(model, "ulysses", None)
    return ulysses.agree(reason) if ulysses else reason


def unfit(models: Sequence[nn.Module], plan: Plan) -> str | None:
    """Return why graphs cannot compute the steps of some transformers, None where they can."""
    if plan.device == "cpu":
        return "runs on the CPU"
    if environment.switch(environment.GRAPHS) is False:
        return f"{environment.GRAPHS}=0"
    if plan.offload != "none":
        return f"plan {plan.name} moves weights"
    for model in models:
        if not fused_transformer.all_fused(model):
            return "not all blocks run in fused kernels"
        if reason := _changed(model):
            return reason
    return None


def _changed(model: nn.Module) -> str | None:
    """Return what somebody has put into a transformer that a graph would skip, None if nothing"""
    if any(getattr(torch_modules, name) for name in GLOBAL_HOOKS):
        return "a hook for all modules"
    if getattr(model, "peft_config", None):
        return "a LoRA that diffusers has attached"
    if getattr(model, "_parallel_config", None) is not None:
        return "several GPUs"
    for name, module in model.named_modules():
        if any(getattr(module, hooks) for hooks in HOOKS) or "forward" in vars(module):
            return f"a hook on {name or 'the transformer'}"
        if module._compiled_call_impl is not None:
            return "torch.compile"
    return None


def _unusual(more: dict[str, Any]) -> str | None:
    """Return why a call cannot be a graph's: arguments, or a mode of torch"""
    more = {name: value for name, value in more.items() if value is not None}
    if more.pop("return_dict", True) or more:
        return "arguments that a graph does not take"
    if torch.is_grad_enabled() or any(map(torch.is_autocast_enabled, ("cuda", "cpu"))):
        return "gradients or autocast"
    return None


def signature(model: nn.Module) -> tuple:
    """Return what decides a transformer's launches beside its inputs."""
    attention = tuple(
        sla.settings
        for block in model.blocks
        if isinstance(block.attn1.processor, SLAProcessor) and (sla := block.attn1.processor.sla) is not None
    )
    tensors = [*model.parameters(), *model.buffers()]
    return (
        getattr(getattr(model, "ulysses", None), "grown", 0),
        tuple(map(type, model.modules())),
        tuple(
            type(processor) for block in model.blocks for processor in (block.attn1.processor, block.attn2.processor)
        ),
        attention,
        tuple((x.data_ptr(), x.dtype, x.stride()) for x in tensors),
        tuple(backends.variables().values()),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
