"""Naming conventions: whose names the tensors of a weight file have.

`sort_out` removes the wrappers of training frameworks, takes one of several copies of a model, and renames its tensors
as diffusers and transformers name them. A convention renames the path of a module. The end of a name, such as
`.weight_scale`, belongs to a number format (see `numbers`) and stays.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import CheckpointError
from ..values import shown

PROJ_L = ".attn1.processor.sla.proj_l."  # the path of SLA's projections within a block
# Parts of names that torch.compile, DDP, FSDP, DeepSpeed and activation checkpointing insert
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module|module)\.)+"
)
MOST_COPIES = 64  # of a model in a file, because each is compared with all names
# The copy of a model to take where a file has several: averaged weights first, then the best known words
PREFERRED = ("net", "generator", "student", "dit", "diffusion_model", "transformer", "model", "")
EMA = re.compile(r"(?:^|[._])ema(?:[._]|$)")


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How one family of programs names the tensors of a model.

    Args:
        name: whose convention it is.
        kind: the kind of model, as in `recognise.Contents`.
        mark: a pattern that some names of this convention match, and no names of later conventions.
        renames: patterns and their replacements, applied in order to each name.
    """

    name: str
    kind: str
    mark: str
    renames: tuple[tuple[str, str], ...] = ()

    def fits(self, names: Iterable[str]) -> bool:
        """Return whether the names are of this convention."""
        pattern = re.compile(self.mark)
        return any(pattern.search(name) for name in names)

    def rename(self, name: str) -> str:
        """Return diffusers' or transformers' name of a tensor or a module."""
        for pattern, replacement in self._patterns:
            name = pattern.sub(replacement, name)
        return name

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern, str]]:
        return [(re.compile(pattern), replacement) for pattern, replacement in self.renames]


SLA_PATHS = (r"\.attn1\.(?:attn_op\.local_attn|attn_impl)\.proj_l\b", PROJ_L[:-1])
CONDITION = "condition_embedder"
# Conventions of Wan's transformer, then of its VAE and of umT5's encoder
CONVENTIONS = (
    Convention(
        name="upstream",
        kind="transformer",
        mark=r"\bblocks\.\d+\.(?:self_attn|cross_attn)\.",
        renames=(
            (r"\bself_attn\b", "attn1"),
            (r"\bcross_attn\b", "attn2"),
            (r"(\battn[12])\.([qkv])\b", r"\1.to_\2"),
            (r"(\battn[12])\.o\b", r"\1.to_out.0"),
            (r"(\battn2)\.([kv])_img\b", r"\1.add_\2_proj"),
            (r"\bnorm_k_img\b", "norm_added_k"),
            (r"(\bblocks\.\d+)\.norm3\b", r"\1.norm_cross"),  # diffusers numbers the norms in the order of their use
            (r"(\bblocks\.\d+)\.norm2\b", r"\1.norm3"),
            (r"(\bblocks\.\d+)\.norm_cross\b", r"\1.norm2"),
            (r"\bffn\.0\b", "ffn.net.0.proj"),
            (r"\bffn\.2\b", "ffn.net.2"),
            (r"^head\.head\b", "proj_out"),
            (r"^head\.modulation\b", "scale_shift_table"),
            (r"\bmodulation\b", "scale_shift_table"),
            (r"^text_embedding\.0\b", f"{CONDITION}.text_embedder.linear_1"),
            (r"^text_embedding\.2\b", f"{CONDITION}.text_embedder.linear_2"),
            (r"^time_embedding\.0\b", f"{CONDITION}.time_embedder.linear_1"),
            (r"^time_embedding\.2\b", f"{CONDITION}.time_embedder.linear_2"),
            (r"^time_projection\.1\b", f"{CONDITION}.time_proj"),
            (r"^img_emb\.proj\.0\b", f"{CONDITION}.image_embedder.norm1"),
            (r"^img_emb\.proj\.1\b", f"{CONDITION}.image_embedder.ff.net.0.proj"),
            (r"^img_emb\.proj\.3\b", f"{CONDITION}.image_embedder.ff.net.2"),
            (r"^img_emb\.proj\.4\b", f"{CONDITION}.image_embedder.norm2"),
            SLA_PATHS,
        ),
    ),
    Convention(
        name="FastVideo",
        kind="transformer",
        mark=r"\bblocks\.\d+\.(?:to_[qkv]\b|to_out\b|self_attn_residual_norm\b|ffn\.fc_in\b)",
        renames=(
            (r"(\bblocks\.\d+)\.(to_[qkv]|norm_[qk])\b", r"\1.attn1.\2"),
            (r"(\bblocks\.\d+)\.to_out\b", r"\1.attn1.to_out"),
            (r"(\battn[12]\.to_out)\b(?!\.0\b)", r"\1.0"),
            (r"(\bblocks\.\d+)\.self_attn_residual_norm\.norm\b", r"\1.norm2"),
            (r"\bffn\.fc_in\b", "ffn.net.0.proj"),
            (r"\bffn\.fc_out\b", "ffn.net.2"),
            (r"\btext_embedder\.fc_in\b", "text_embedder.linear_1"),
            (r"\btext_embedder\.fc_out\b", "text_embedder.linear_2"),
            (r"\btime_embedder\.mlp\.fc_in\b", "time_embedder.linear_1"),
            (r"\btime_embedder\.mlp\.fc_out\b", "time_embedder.linear_2"),
            (r"\btime_modulation\.linear\b", "time_proj"),
            (r"^patch_embedding\.proj\b", "patch_embedding"),
            SLA_PATHS,
        ),
    ),
    Convention(
        name="SGLang",
        kind="transformer",
        mark=r"\bblocks\.\d+\.attn1\.attn_op\.local_attn\.",
        renames=(SLA_PATHS,),
    ),
    Convention(name="diffusers", kind="transformer", mark=r"\bblocks\.\d+\.attn[12]\.", renames=(SLA_PATHS,)),
    Convention(name="upstream", kind="vae", mark=r"^decoder\.conv1\."),  # diffusers renames them all at once
    Convention(name="diffusers", kind="vae", mark=r"^decoder\.conv_in\."),
    Convention(
        name="upstream",
        kind="text encoder",
        mark=r"^blocks\.\d+\.(?:attn\.q|pos_embedding\.embedding)\b",
        renames=(
            (r"^token_embedding\b", "shared"),
            (r"^norm\b", "encoder.final_layer_norm"),
            (r"^blocks\b", "encoder.block"),
            (r"\.norm1\b", ".layer.0.layer_norm"),
            (r"\.attn\b", ".layer.0.SelfAttention"),
            (r"\.pos_embedding\.embedding\b", ".layer.0.SelfAttention.relative_attention_bias"),
            (r"\.norm2\b", ".layer.1.layer_norm"),
            (r"\.ffn\.gate\.0\b", ".layer.1.DenseReluDense.wi_0"),
            (r"\.ffn\.fc1\b", ".layer.1.DenseReluDense.wi_1"),
            (r"\.ffn\.fc2\b", ".layer.1.DenseReluDense.wo"),
        ),
    ),
    Convention(
        name="llama.cpp",
        kind="text encoder",
        mark=r"^enc\.blk\.",
        renames=(
            (r"^token_embd\b", "shared"),
            (r"^enc\.output_norm\b", "encoder.final_layer_norm"),
            (r"^enc\.blk\b", "encoder.block"),
            (r"\.attn_norm\b", ".layer.0.layer_norm"),
            (r"\.attn_rel_b\b", ".layer.0.SelfAttention.relative_attention_bias"),
            (r"\.attn_([qkvo])\b", r".layer.0.SelfAttention.\1"),
            (r"\.ffn_norm\b", ".layer.1.layer_norm"),
            (r"\.ffn_gate\b", ".layer.1.DenseReluDense.wi_0"),
            (r"\.ffn_up\b", ".layer.1.DenseReluDense.wi_1"),
            (r"\.ffn_down\b", ".layer.1.DenseReluDense.wo"),
        ),
    ),
    Convention(
        name="transformers",
        kind="text encoder",
        mark=r"^encoder\.block\.\d+\.layer\.",
        renames=((r"^.*\.spiece_model$", "spiece_model"),),  # outside of the encoder in ComfyUI's checkpoints
    ),
)
# A tensor that every model of a kind has. The text before it is the prefix of that copy of the model.
ANCHORS = {
    "transformer": r"patch_embedding\.",
    "vae": r"decoder\.(?:conv1|conv_in)\.",
    "text encoder": r"(?:token_embedding|token_embd|shared|encoder\.embed_tokens)\.",
}


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """The tensors of one model in a file, by diffusers' or transformers' names.

    Args:
        kind: as in `recognise.Contents`; "unknown" where no convention fits.
        convention: the name of the convention.
        copy: the prefix of the copy that was taken; None for a file with one copy.
        tensors: by name.
        others: kinds of the models that the file has beside this one, under prefixes of their own.
    """

    kind: str
    convention: str
    copy: str | None
    tensors: dict[str, Any]
    others: tuple[str, ...] = ()


def sort_out(tensors: Mapping[str, Any], path: object, wanted: str | None = None) -> Sorted:
    """Find the model in a file's tensors, and rename its tensors.

    Args:
        tensors: by the file's own names.
        path: of the file, for errors.
        wanted: the kind to take of a file with several, such as a checkpoint of ComfyUI. None: the transformer first.

    Raises:
        CheckpointError: the file has several models, and nothing tells which one to take.
    """
    tensors = without_wrappers(tensors)
    copies = {kind: prefixes for kind in ANCHORS if (prefixes := _prefixes(tensors, kind, path))}
    for kind in sorted(copies, key=lambda kind: kind != wanted):
        prefixes = copies[kind]
        foreign = {one for other in copies if other != kind for one in copies[other]} - {"", *prefixes}
        prefix = _by_preference(prefixes, path)[0]
        own = _of_copy(tensors, prefix, [*prefixes, *foreign])
        convention = next(one for one in CONVENTIONS if one.kind == kind and one.fits(own))
        return Sorted(
            kind=kind,
            convention=convention.name,
            copy=(prefix.rstrip(".") or "the names without a prefix") if len(prefixes) > 1 else None,
            tensors=_renamed(own, convention, path),
            others=tuple(other for other in copies if other != kind),
        )
    return Sorted(kind="unknown", convention="unknown", copy=None, tensors=dict(tensors))


def _prefixes(tensors: Mapping[str, Any], kind: str, path: object) -> list[str]:
    """The prefixes of the copies of a model of this kind"""
    found = (re.match(rf"((?:.*\.)?){ANCHORS[kind]}", name) for name in tensors)
    prefixes = sorted({match[1] for match in found if match})
    if len(prefixes) > MOST_COPIES:
        raise CheckpointError(
            f"{str(path)!r} has {len(prefixes):,} copies of a {kind}. Expected at most {MOST_COPIES}. "
            "Take another file."
        )
    return [
        prefix
        for prefix in prefixes
        if any(
            one.kind == kind and one.fits(name.removeprefix(prefix) for name in tensors if name.startswith(prefix))
            for one in CONVENTIONS
        )
    ]


def without_wrappers(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the wrappers of training frameworks from all names. Names that would collide stay as they are."""
    renamed = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    return renamed if len(renamed) == len(tensors) else dict(tensors)


def module_name(name: str, known: Callable[[str], bool]) -> str | None:
    """Return diffusers' name of a module of a transformer, whatever prefix and convention the name has.

    Args:
        name: with dots, such as "diffusion_model.blocks.0.self_attn.q".
        known: whether the model has a module of a name.

    Returns:
        The name; None where the model has no such module.
    """
    name, rest = WRAPPERS.sub("", f"{name}."), ""
    parts = name.rstrip(".").split(".")
    for first in range(len(parts)):
        rest = ".".join(parts[first:])
        for convention in CONVENTIONS:
            if convention.kind == "transformer" and known(renamed := convention.rename(rest)):
                return renamed
    return None


def _of_copy(tensors: Mapping[str, Any], prefix: str, prefixes: list[str]) -> dict[str, Any]:
    """The tensors of one copy of a model, and those of no copy"""
    others = tuple(one for one in prefixes if one != prefix and len(one) > len(prefix))
    own = {name.removeprefix(prefix): one for name, one in tensors.items()
           if name.startswith(prefix) and not name.startswith(others)}  # fmt: skip
    copies = tuple(one for one in prefixes if one)
    rest = {name: one for name, one in tensors.items() if not name.startswith((prefix, *copies)) and name not in own}
    return own | rest


def _by_preference(prefixes: list[str], path: object) -> list[str]:
    """The prefixes of copies, the best first. Raises CheckpointError where two are equally good."""

    def rank(prefix: str) -> tuple:
        words = prefix.rstrip(".").split(".")
        stems = {word.removesuffix("_ema").removeprefix("ema_") for word in words}
        place = min((PREFERRED.index(word) for word in stems if word in PREFERRED), default=len(PREFERRED))
        return not EMA.search(prefix), place

    ordered = sorted(prefixes, key=rank)
    if len(ordered) > 1 and rank(ordered[0]) == rank(ordered[1]):
        raise CheckpointError(
            f"{str(path)!r} has several models: {', '.join(shown(prefix) for prefix in ordered[:4])}. Expected one, or "
            "averaged weights beside it. Save the model that you want as a file of its own."
        )
    return ordered


def _renamed(tensors: dict[str, Any], convention: Convention, path: object) -> dict[str, Any]:
    if convention.kind == "vae" and convention.name == "upstream":
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers  # here, because it takes 2 s

        return convert_wan_vae_to_diffusers(dict(tensors))
    renamed = {convention.rename(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        names: dict[str, str] = {}
        twice = next(n for name in tensors if names.setdefault(n := convention.rename(name), name) != name)
        raise CheckpointError(
            f"{str(path)!r} has {twice} under two names. Expected each tensor once. Download the file again."
        )
    return renamed
