"""diffusers' Wan pipelines, with what a few-step model needs when a pipeline is called directly.

The two classes have the names of diffusers' own, because `save_pretrained` writes the name. diffusers' own
`from_pretrained` then makes its own class, with our scheduler and, by `SavedTransformer`, with SLA and 8-bit linears.
"""

import inspect
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin  # diffusers looks for this name beside SavedTransformer

from . import catalog, checkpoint
from .errors import InputError, warn
from .files import recognise
from .files.weight_set import weight_sets
from .scheduler import MAX_STEPS, RCMScheduler
from .values import local

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
SIZE = {"width": None, "height": None, "num_frames": None}  # None: the model's own
DEFAULTS = SIZE | {"num_inference_steps": MAX_STEPS, "guidance_scale": 1.0}


def _few_steps(theirs: Callable) -> Callable:
    """Return `__call__` of a pipeline of diffusers, with our defaults and with all noise from the user's generator"""
    signature = inspect.signature(theirs)
    changed = [p.replace(default=DEFAULTS.get(name, p.default)) for name, p in signature.parameters.items()]

    @wraps(theirs)
    def call(self, *args, **kwargs):
        if not (self.turbo_nb and isinstance(self.scheduler, RCMScheduler)):  # a user's own scheduler
            return theirs(self, *args, **kwargs)
        bound = call.__signature__.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given, spec = bound.arguments, self.turbo_nb.spec
        for name, own in zip(SIZE, (*spec.size, spec.num_frames), strict=True):
            given[name] = own if given[name] is None else given[name]
        if given["guidance_scale"] > 1:
            warn("guidance_scale is above 1. The model was trained without guidance, which doubles the time. Take 1.")
        elif given["negative_prompt"] is not None or given["negative_prompt_embeds"] is not None:
            warn("negative_prompt has no effect, because the model works without guidance. Leave it out.")
        for prompt in [given["prompt"]] if isinstance(given["prompt"], str) else given["prompt"] or ():
            self.turbo_nb.prompt_encoder.warn_of_lost_words(prompt)
        with self.turbo_nb.lock, self.scheduler.drawing_from(given["generator"]):
            if given["latents"] is None:
                given["latents"] = self.scheduler.start_latents(_latents_shape(self, given))
            return theirs(*bound.args, **bound.kwargs)

    call.__signature__ = signature.replace(parameters=changed)
    return call


def _latents_shape(pipeline: diffusers.DiffusionPipeline, given: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape that `prepare_latents` of diffusers computes"""
    prompt, generator = given["prompt"], given["generator"]
    prompts = prompt if isinstance(prompt, list) else given["prompt_embeds"] if prompt is None else [prompt]
    count = (1 if prompts is None else len(prompts)) * (given["num_videos_per_prompt"] or 1)
    if isinstance(generator, list) and len(generator) != count:
        raise InputError(f"generator is a list of {len(generator)}. Expected {count}, one for each clip.")
    frames = given["num_frames"] // pipeline.vae_scale_factor_temporal + 1  # of 4n + 1, to which diffusers rounds
    sides = (given[side] // pipeline.vae_scale_factor_spatial for side in ("height", "width"))
    return count, pipeline.vae.config.z_dim, frames, *sides


def _remove_torch_files(folders: Iterable[Path], variant: str | None) -> None:
    """Remove the torch files that a save replaces, because torch writes into the file that weights are mapped from.

    Reading a mapped weight would then end the process. A file that is removed stays readable as long as it is mapped.
    """
    name = f"diffusion_pytorch_model{f'.{variant}' if variant else ''}.bin"
    for folder in folders:
        for file in weight_sets(folder).get(name, ()):
            (folder / file).unlink()


class _Placed:
    """What both pipelines do where `load_pipeline` made them; else they are diffusers' own."""

    turbo_nb: Any = None  # the LoadedModel

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, variant: str | None = None, *args, **kwargs
    ) -> None:
        """Save all parts as diffusers does. A text encoder that is not loaded is loaded for it.

        Merged LoRAs and 8-bit linears are saved as they are. Top-k is not saved, because it is an option of loading.
        """
        save_directory = local(save_directory, "save_directory")
        if not safe_serialization:
            _remove_torch_files([Path(save_directory, part) for part in self.components], variant)
        save = partial(super().save_pretrained, save_directory, safe_serialization, variant, *args, **kwargs)
        if self.turbo_nb is None:
            return save()
        with self.turbo_nb.lock, self.turbo_nb.prompt_encoder.loaded():
            self.maybe_free_model_hooks()  # because the weights on the GPU are copies
            self.register_modules(text_encoder=self.text_encoder)
            return save()

    def save_config(self, save_directory: str | Path, *args, **kwargs) -> None:
        """Save model_index.json with our loader of transformers, because diffusers' own drops SLA and 8-bit linears."""
        super().save_config(save_directory, *args, **kwargs)
        path = Path(save_directory, self.config_name)
        index = json.loads(path.read_text(encoding="utf-8"))
        for name in ("transformer", "transformer_2"):
            if index.get(name, [None])[0]:
                index[name] = [__name__, SavedTransformer.__name__]
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __copy__(self) -> "_Placed":
        """Return a pipeline with the same parts and the same memory plan."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy take. Raises InputError where a memory plan has placed the weights."""
        if self.turbo_nb:
            raise InputError(
                f"pipeline is placed by memory plan {self.turbo_nb.plan.name!r}, which does not know of a copy of the "
                "weights. Expected one without a plan to pickle or to deep-copy. Load the model again, or call "
                "save_pretrained(folder) and load the folder."
            )
        return self.__dict__

    def to(self, *args, **kwargs):
        """Change the dtype as diffusers does. Raises InputError for a device other than that of the memory plan."""
        device = next((one for one in (*args, kwargs.get("device")) if isinstance(one, str | int | torch.device)), None)
        if self.turbo_nb is None or device is None:
            return super().to(*args, **kwargs)
        wanted, own = torch.device(device), torch.device(self.turbo_nb.device)
        if (wanted.type, wanted.index or 0) != (own.type, own.index or 0):
            raise InputError(
                f"device is {str(wanted)!r}. Expected {str(own)!r}, where load_pipeline has put this pipeline. Load it "
                f"again with device={str(wanted)!r}."
            )
        return self if self.turbo_nb.plan.offload != "none" else super().to(*args, **kwargs)

    def enable_model_cpu_offload(self, *args, **kwargs) -> None:
        """Raise InputError, because the memory plan decides where the parts are."""
        self._require_no_plan("offload")
        super().enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args, **kwargs) -> None:
        """Raise InputError, because the memory plan decides where the parts are."""
        self._require_no_plan("group")
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(self, *args, **kwargs) -> None:
        """Raise InputError, because the memory plan decides where the parts are."""
        self._require_no_plan("group")
        super().enable_group_offload(*args, **kwargs)

    def _require_no_plan(self, plan: str) -> None:
        if self.turbo_nb:
            raise InputError(
                f"memory plan is {self.turbo_nb.plan.name!r}. Expected no other offload beside it. Load the "
                f"model again with memory_plan={plan!r}. Without one it takes the fastest plan that fits."
            )

    def _get_t5_prompt_embeds(self, *args, **kwargs) -> torch.Tensor:
        """Encode prompts. If the memory plan has freed the text encoder, it is loaded for this"""
        model = self.turbo_nb
        with model.lock if model else nullcontext(), model.prompt_encoder.loaded() if model else nullcontext():
            return super()._get_t5_prompt_embeds(*args, **kwargs)


@cache
def __getattr__(name: str) -> type:
    """Make the class of this name when it is first used, because importing a pipeline of diffusers takes a second"""
    if name not in PIPELINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    theirs = getattr(diffusers, name)
    body = {"__doc__": f"diffusers' `{name}`, placed by a memory plan.", "__module__": __name__}
    return type(name, (_Placed, theirs), body | {"__call__": _few_steps(theirs.__call__)})


class SavedTransformer(ModelMixin):
    """What a saved pipeline names as its transformer, so that diffusers loads it with SLA and 8-bit linears."""

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **_: Any
    ) -> diffusers.WanTransformer3DModel:
        """Load the transformer of a saved pipeline.

        Args:
            folder: of the transformer.
            torch_dtype: of its weights. None: as they were saved.
        """
        contents = recognise.read(Path(folder), "transformer")
        known = catalog.of_arch(contents.arch)
        topk = {"sla_topk": known.sla_topk} if known else {}
        return checkpoint.load_transformer(contents, dtype=torch_dtype, **topk)
