"""The settings of a part: those that its weights tell, and from config.json those that they do not.

A setting that both tell must be the same in both. Other settings have a rule each. A key without a rule is left out,
because a library may act on it: for `_attn_implementation` transformers fetches code from the Hub.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..values import shown
from .filenames import CONFIG
from .reading import trusted_config

TRANSFORMER, VAE, TEXT_ENCODER = "WanTransformer3DModel", "AutoencoderKLWan", "umt5"
WRITERS = {"transformer": TRANSFORMER, "vae": VAE, "text encoder": TEXT_ENCODER}  # by kinds of `recognise.Contents`
MOST = 4096  # channels of a part, because a larger number in a damaged file would take minutes or all memory
LARGEST = 1000.0  # of a latent's mean or standard deviation

Rule = tuple[Callable[[Any, Mapping[str, Any]], bool], str]  # whether a value fits the others, and what is expected


def part_config(folder: Path, written_by: str, own: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings of a part in a folder.

    Args:
        folder: of the part.
        written_by: the class, as `_class_name` or `model_type` of config.json.
        own: the settings that the weights tell. They are compared only if they are given.

    Returns:
        `own`, and the other settings that config.json has. None where this class did not write a config.json.

    Raises:
        CheckpointError: config.json is damaged, belongs to other weights, or has a value that no part can have.
    """
    config = trusted_config(folder, [written_by])
    if config is None:
        return None
    path, rules = folder / CONFIG, RULES[written_by]
    for key in own:
        if key in config and config[key] != own[key]:
            raise _wrong(key, path, config[key], f"{own[key]}, as in the weights beside it")
    found = {key: config[key] for key in rules if key in config}
    merged = own | found
    if written_by == VAE and not merged.keys() >= rules.keys():
        merged = _vae_defaults() | merged
    for key, (fits, expected) in rules.items():
        if key in merged and not fits(merged[key], merged):
            raise _wrong(key, path, merged[key], expected)
    return own | found


def _vae_defaults() -> dict[str, Any]:
    """What diffusers takes for settings that config.json does not have"""
    from diffusers import AutoencoderKLWan  # here, because the import takes seconds

    return {name: one.default for name, one in signature(AutoencoderKLWan.__init__).parameters.items()}


def _wrong(key: str, path: Path, got: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{key} in {str(path)!r} is {shown(got)}. Expected {expected}. Download the folder again.")


def _count(least: int, most: int = MOST) -> Rule:
    return lambda value, _: type(value) is int and least <= value <= most, f"{least} to {most}"


def _numbers(value: Any, above: float, length: int) -> bool:
    """Whether a value is a list of so many numbers above `above`"""
    return (
        isinstance(value, list)
        and len(value) == length
        and all(type(one) in (int, float) and above < one <= LARGEST for one in value)
    )


def _optional(rule: Rule) -> Rule:
    return lambda value, config: value is None or rule[0](value, config), f"{rule[1]}, or null"


def _each(rule: Rule, most: int) -> Rule:
    def fits(value: Any, config: Mapping[str, Any]) -> bool:
        return isinstance(value, list) and 0 < len(value) <= most and all(rule[0](one, config) for one in value)

    return fits, f"a list of up to {most} numbers, each {rule[1]}"


def _computed(compute: Callable[[Mapping[str, Any]], int], words: str) -> Rule:
    return lambda value, config: type(value) is int and value == compute(config), words


# eps of a norm: transformers takes floats only
EPSILON: Rule = (lambda value, _: type(value) is float and 0 < value <= 0.01, "a number above 0, at most 0.01")
PIXEL: Rule = _computed(lambda config: 3 * (config["patch_size"] or 1) ** 2, "3 channels for each pixel of a patch")
RULES: dict[str, dict[str, Rule]] = {
    TRANSFORMER: {"eps": EPSILON, "rope_max_seq_len": _count(1024, 65536)},
    TEXT_ENCODER: {
        "layer_norm_epsilon": EPSILON,
        "relative_attention_max_distance": (  # because closer tokens have a bucket each
            lambda value, config: (
                type(value) is int and config.get("relative_attention_num_buckets", 0) // 4 < value < 1 << 20
            ),
            "a number of tokens above a quarter of relative_attention_num_buckets",
        ),
        "feed_forward_proj": (lambda value, _: value == "gated-gelu", "'gated-gelu'"),
    },
    # In the order of dependence, because a rule reads the settings before its own
    VAE: {
        "base_dim": _count(1),
        "decoder_base_dim": _optional(_count(1)),
        "z_dim": _count(1),
        "dim_mult": _each(_count(1, 64), 8),
        "num_res_blocks": _count(0, 64),
        "attn_scales": (lambda value, _: value == [], "[]"),
        "temperal_downsample": (
            lambda value, config: (
                isinstance(value, list)
                and len(value) == len(config["dim_mult"]) - 1
                and all(type(one) is bool for one in value)
            ),
            "true or false for each number of dim_mult but one",
        ),
        "is_residual": (lambda value, _: type(value) is bool, "true or false"),
        "patch_size": _optional(_count(1, 8)),
        "in_channels": PIXEL,
        "out_channels": PIXEL,
        "latents_mean": (
            lambda value, config: _numbers(value, -LARGEST, config["z_dim"]),
            f"a number of -{LARGEST:g} to {LARGEST:g} for each of z_dim channels",
        ),
        "latents_std": (
            lambda value, config: _numbers(value, 0, config["z_dim"]),
            f"a number above 0, at most {LARGEST:g}, for each of z_dim channels",
        ),
        "scale_factor_temporal": _computed(
            lambda config: 1 << sum(config["temperal_downsample"]), "2 to the power of the steps of temperal_downsample"
        ),
        "scale_factor_spatial": _computed(
            lambda config: (config["patch_size"] or 1) << (len(config["dim_mult"]) - 1),
            "the factor of dim_mult and patch_size",
        ),
    },
}
