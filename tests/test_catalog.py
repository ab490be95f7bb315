"""Names and vocabularies, without torch."""

import pytest

from turbo_nb import catalog
from turbo_nb.errors import UnknownModelError


def test_auto_is_not_a_model_of_the_catalogue():
    assert catalog.find("nano") is catalog.NANO
    with pytest.raises(UnknownModelError):
        catalog.find("auto")


def test_every_model_has_a_prompt_that_suits_it():
    assert all(spec.understands(spec.example) for spec in catalog.MODELS.values())
    assert catalog.NANO.example != catalog.find("Wan2.1-14B").example


def test_unknown_model_lists_the_known_ones_and_a_close_one():
    with pytest.raises(UnknownModelError, match=r"'nanno'.*auto, nano.*Wan2.2-A14B.*did you mean 'nano'"):
        catalog.find("nanno")


def test_upstream_names_are_aliases():
    assert catalog.find("Wan2.2-A14B") is catalog.find("TurboWan2.2-I2V-A14B-720P")
    assert all(catalog.find(name).name == target for name, target in catalog.UPSTREAM_NAMES.items())


def test_released_models_have_a_file_for_each_expert_and_quantisation():
    spec = catalog.find("TurboWan2.2-I2V-A14B-720P")
    assert [f.path for f in spec.quant_files] == [
        "TurboWan2.2-I2V-A14B-high-720P-quant.pth",
        "TurboWan2.2-I2V-A14B-low-720P-quant.pth",
    ]
    assert (spec.task, spec.boundary, spec.sigma_max, spec.arch.in_channels) == ("i2v", 0.9, 200.0, 36)


def test_a_model_is_known_by_its_shape():
    assert catalog.of_arch(catalog.ARCH_1_3B).name == "TurboWan2.1-T2V-1.3B-480P"
    assert catalog.of_arch(catalog.Arch(dim=64, num_heads=1, num_layers=1, ffn_dim=64)) is None


@pytest.mark.parametrize(
    ("prompt", "understood"),
    [
        ("a large red circle moving from left to right on a black background", True),
        ("Tiny SCARLET boxes", False),
        ("a tiny scarlet box", True),
        ("a red apple", False),
        ("a triangle", False),
        ("bored circles discovered", False),
        ("", False),
    ],
)
def test_nano_understands_prompts_with_a_shape_and_a_colour(prompt, understood):
    assert catalog.NANO.understands(prompt) is understood
