"""Names, sizes and vocabularies, without torch."""

import pytest

from turbo_nb import catalog
from turbo_nb.errors import InputError, UnknownModelError


def test_auto_is_nano():
    assert catalog.find("auto") is catalog.find("nano") is catalog.NANO


def test_unknown_model_lists_the_known_ones_and_a_close_one():
    with pytest.raises(UnknownModelError, match=r"'nanno'.*auto, nano.*did you mean 'nano'"):
        catalog.find("nanno")


def test_a_folder_is_a_model():
    spec = catalog.find(str(catalog.NANO.folder))
    assert (spec.name, spec.size, spec.num_frames) == ("nano", (832, 480), 81)


@pytest.mark.parametrize(
    ("resolution", "aspect_ratio", "size"),
    [
        (None, None, (128, 128)),
        ("480p", None, (832, 480)),
        ("720p", "9:16", (720, 1280)),
        ("160x96", None, (160, 96)),
    ],
)
def test_sizes(resolution, aspect_ratio, size):
    assert catalog.size_of(catalog.NANO, resolution, aspect_ratio) == size


@pytest.mark.parametrize(
    ("resolution", "aspect_ratio", "words"),
    [
        ("130x128", None, "multiples of 16, such as 128x128"),
        ("0x128", None, "multiples of 16, such as 16x128"),
        ("1080p", None, "480p, 720p or WIDTHxHEIGHT"),
        ("480p", "2:1", "1:1, 4:3, 3:4, 16:9, 9:16"),
        ("128x128", "1:1", "leave aspect_ratio out"),
        (None, "1:1", "needs a resolution"),
    ],
)
def test_impossible_sizes_say_what_is_allowed(resolution, aspect_ratio, words):
    with pytest.raises(InputError, match=words):
        catalog.size_of(catalog.NANO, resolution, aspect_ratio)


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
def test_what_nano_understands(prompt, understood):
    assert catalog.NANO.understands(prompt) is understood
