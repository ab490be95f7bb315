"""Options: declared once, checked when they are made, and the same wherever they appear."""

import enum
import inspect
import json
import typing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import turbo_nb
from turbo_nb import catalog, cli, records, settings
from turbo_nb import values as kinds
from turbo_nb.batch import prompts
from turbo_nb.errors import InputError, TurboNbError
from turbo_nb.files import lora
from turbo_nb.runtime import plan
from turbo_nb.settings import ClipSettings, LoadOptions, RunOptions, build, options, resolve_clip
from turbo_nb.video import images, mp4

NANO, WAN, I2V = (catalog.find(name) for name in ("nano", "Wan2.1-1.3B", "Wan2.2-A14B"))


@pytest.mark.parametrize(
    ("cls", "name", "values"),
    [
        (LoadOptions, "memory", [-3, 0, float("inf"), float("nan"), "12", True]),
        (LoadOptions, "memory_plan", ["cpu-tex", "", 3]),
        (LoadOptions, "sla_topk", [0, -1, 1.5, "0.1", float("nan")]),
        (LoadOptions, "quant_linear", ["yes", 1, 0.0]),
        (LoadOptions, "attention_type", ["magic", b"sla"]),
        (LoadOptions, "attention_backend", ["magic"]),
        (LoadOptions, "device", ["gpu", "mps", "cuda:", "cuda:x", "cpu:0", 0]),
        (LoadOptions, "model", ["", 3, ("one",), "a\0b", "a\ud800b", Path("\ud800")]),
        (LoadOptions, "text_cache", ["no", 1]),
        (ClipSettings, "prompt", ["", " \n", 3, ["a"], float("nan"), "a \ud800 circle"]),
        (ClipSettings, "num_frames", [0, -3, 2, 24, 4097, 2**70, 5.0, "5", True]),
        (ClipSettings, "num_steps", [0, 5, 1.0, "4"]),
        (ClipSettings, "seed", [-1, 2**63, 10**5000, 1.0, None.__class__]),
        (ClipSettings, "resolution", ["big", "100", "100x", "x100", "-16x16", "480P", "1e3x16", 480]),
        (ClipSettings, "resolution", [(128,), (128.0, 128), (10**7, 16), ("a", 16)]),
        (ClipSettings, "aspect_ratio", ["1:2", "wide"]),
        (ClipSettings, "sigma_max", [14, float("inf"), "80"]),
        (ClipSettings, "ode", ["false", 0, 1]),
        (ClipSettings, "boundary", [-0.1, 1.1, "0.9"]),
        (ClipSettings, "noise_device", ["tpu", "cuda:0"]),
        (RunOptions, "num_samples", [0, 10**9, 1.5]),
        (RunOptions, "workers", [0, -1]),
    ],
)
def test_a_value_that_cannot_be_used_is_an_error_of_three_parts(cls, name, values):
    given = {"prompt": "x"} if cls is ClipSettings else {}
    for value in values:
        with pytest.raises(InputError, match=rf"(?s)^{name} is .{{1,90}}\. Expected .+\.") as error:
            build(cls, given | {name: value})
        assert len(str(error.value)) < 400


def test_a_long_value_loses_its_middle_because_a_path_ends_in_the_file_s_name():
    text = "/a" * 50 + "/red.png"
    assert len(kinds.shown(text)) == 80 and kinds.shown(text).endswith("red.png'")
    assert kinds.shown(Path(text)) == repr(text)  # whole
    assert len(kinds.shown(Path("/a" * 200))) == 300
    assert kinds.shown("x" * 78) == repr("x" * 78)


def test_a_value_whose_repr_has_several_lines_is_shown_in_one():
    assert kinds.shown(np.eye(2)) == "array([[1., 0.], [0., 1.]])"
    assert kinds.shown("a \n  b") == repr("a \n  b")


@pytest.mark.parametrize("pair", [(96, 128), [96, 128], (np.int64(96), np.int32(128)), "96x128"], ids=str)
def test_a_resolution_is_text_or_a_pair_of_whole_numbers(pair):
    assert resolve_clip(ClipSettings(prompt="x", resolution=pair), NANO).size[:2] == (96, 128)


@pytest.mark.parametrize("sides", ["100000x100000", "16400x16", "100x100", (17, 16)], ids=str)
def test_sides_that_no_model_takes_are_an_error_without_a_model(sides):
    with pytest.raises(InputError, match="multiples of 16, from 16 to 16384"):
        ClipSettings(prompt="x", resolution=sides)


def test_several_prompts_are_sent_to_the_batch():
    with pytest.raises(
        InputError, match=r"prompt is \['a', 'b'\]. Expected text, for one clip. Call turbo_nb.batch.run"
    ):
        ClipSettings(prompt=["a", "b"])


@pytest.mark.parametrize("strength", ["1e38", "-1e38", "101", "nan", "inf"])
def test_a_strength_that_would_break_a_model_is_refused(strength):
    for given in (f"style.safetensors:{strength}", ("style.safetensors", float(strength))):
        with pytest.raises(InputError, match=r"strength of 'style.safetensors' in loras is .* from -100 to 100"):
            LoadOptions(loras=given)


def test_values_of_numpy_count_and_become_python_s():
    clip = ClipSettings(
        prompt="x", seed=np.int64(3), num_frames=np.int32(5), ode=np.True_, sigma_max=np.float32(90), boundary=None
    )
    assert json.loads(json.dumps(vars(clip)))["seed"] == 3
    assert (type(clip.seed), type(clip.ode), type(clip.sigma_max)) == (int, bool, float)


class Word(str, enum.Enum):  # noqa: UP042  str() of a StrEnum's member is its value already
    PROMPT, SIZE, DENSE, CPU = "a red ball", "64x64", "original", "cpu"


@pytest.mark.parametrize(
    ("cls", "name", "word"),
    [
        (ClipSettings, "prompt", Word.PROMPT),
        (ClipSettings, "resolution", Word.SIZE),
        (ClipSettings, "noise_device", Word.CPU),
        (LoadOptions, "attention_type", Word.DENSE),
        (LoadOptions, "device", Word.CPU),
    ],
)
def test_a_member_of_an_enum_of_text_stands_for_its_value(cls, name, word):
    value = getattr(build(cls, {"prompt": "x", name: word} if cls is ClipSettings else {name: word}), name)
    assert type(value) is str and value == word.value


@pytest.mark.parametrize("kind", [bool, np.bool_, np.array, torch.tensor])
@pytest.mark.parametrize("name", ["seed", "num_frames", "boundary"])
def test_a_truth_value_is_not_a_number(kind, name):
    with pytest.raises(InputError, match=f"^{name} is "):
        ClipSettings(prompt="x", **{name: kind(True)})


def test_the_number_of_a_gpu_has_ascii_digits():
    with pytest.raises(InputError, match=r"^device is "):
        LoadOptions(device="cuda:\u0663")


def test_a_home_is_expanded_in_every_option_that_is_a_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {
        (cls, name)
        for cls in (LoadOptions, RunOptions)
        for name, one in options(cls).items()
        if isinstance(one.check, kinds.PathLike)
    }
    assert {name for _, name in paths} >= {"model", "checkpoint", "vae", "text_encoder", "save_path", "output_dir"}
    for cls, name in paths:
        for kind in (str, Path):
            value = getattr(cls(**{name: kind("~/a/b.mp4")}), name)
            assert value == kind(tmp_path / "a" / "b.mp4") and type(value) is type(kind("x"))
        assert getattr(cls(**{name: "a/~/b.mp4"}), name) == "a/~/b.mp4"
    assert LoadOptions(checkpoint=("~/a", "~/b")).checkpoint == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert [one.file for one in LoadOptions(loras=["high=~/a:0.5", Path("~/b")]).loras] == [
        f"{tmp_path}/a",
        f"{tmp_path}/b",
    ]
    assert ClipSettings(prompt="x", image="~/a.png").image == f"{tmp_path}/a.png"
    assert LoadOptions(vae="~nobody-of-this-name/x").vae == "~nobody-of-this-name/x"


@pytest.mark.parametrize("user", ["~\0", "~a\ud800", "~\udcff", "~" * 300, "~" + "é" * 5000])
@pytest.mark.parametrize(
    "opened",
    [
        lambda path: images.load_image(ClipSettings(prompt="x", image=path).image),
        images.load_image,
        lambda path: mp4.check_output(path) and mp4.check_output(f"{path}\0.mp4"),
        mp4.read_metadata,
        lambda path: lora.find(LoadOptions(loras=[path]).loras[0].file),
        lora.find,
        lambda path: prompts.read_prompts(f"{path}.txt"),
        lambda path: LoadOptions(vae=f"{path}\0"),
    ],
)
def test_a_home_of_nobody_is_a_typed_error(opened, user):
    with pytest.raises(TurboNbError):
        opened(f"{user}/x.mp4")


def test_none_is_the_default():
    assert ClipSettings(prompt="x", num_steps=None, seed=None, noise_device=None) == ClipSettings(prompt="x")
    assert LoadOptions(model=None, quant_linear=None, device=None) == LoadOptions()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": "x", "sead": 3}, "'sead'. Expected one of .* Did you mean 'seed'"),
        ({"prompt": "x", "negative_prompt": "y"}, "'negative_prompt'. Expected one of adaptive_resolution"),
        ({"seed": 3}, "prompt is missing"),
    ],
)
def test_a_name_that_is_unknown_or_missing(values, words):
    with pytest.raises(InputError, match=words):
        build(ClipSettings, values)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", " 7 ", 7), ("ode", "Yes", True), ("ode", "0", False), ("sigma_max", "90", 90.0),
        ("resolution", "480p", "480p"), ("noise_device", "cuda", "cuda"),
    ],
)  # fmt: skip
def test_a_cell_of_text_is_read_by_its_kind(name, text, value):
    read = options(ClipSettings)[name].parse(name, text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(("name", "text"), [("seed", "7.5"), ("ode", "perhaps"), ("sigma_max", "many"), ("seed", "")])
def test_a_cell_that_cannot_be_read(name, text):
    with pytest.raises(InputError, match=f"^{name} is "):
        options(ClipSettings)[name].parse(name, text)


@pytest.mark.parametrize(
    ("spec", "asked", "size"),
    [
        (WAN, {}, (832, 480, 81)),
        (I2V, {}, (1280, 720, 81)),
        (NANO, {}, (128, 128, 25)),
        (NANO, {"resolution": "480p"}, (832, 480, 25)),
        (NANO, {"resolution": "720p", "aspect_ratio": "9:16"}, (720, 1280, 25)),
        (NANO, {"resolution": " 64 × 48 ", "num_frames": 5}, (64, 48, 5)),
    ],
)
def test_a_clip_gets_the_models_defaults(spec, asked, size):
    clip = resolve_clip(ClipSettings(prompt="x", **asked), spec)
    assert clip.size == size and (clip.sigma_max, clip.boundary) == (spec.sigma_max, spec.boundary)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"resolution": "100x64"}, "Take 96x64"),
        ({"resolution": "0x16"}, "Take 16x16"),
        ({"resolution": "100000x100000"}, "from 16 to 16384. Take 16384x16384"),
        ({"aspect_ratio": "16:9"}, "Give resolution 480p or 720p"),
        ({"resolution": "64x64", "aspect_ratio": "16:9"}, "None with resolution 64x64"),
        ({"boundary": 0.5}, "one expert"),
    ],
)
def test_settings_that_do_not_suit_the_model(asked, words):
    with pytest.raises(InputError, match=words):
        resolve_clip(ClipSettings(prompt="x", **asked), NANO)


def test_an_image_gives_its_aspect_within_the_tables_of_the_rotary_embedding():
    wide = ClipSettings(prompt="x", adaptive_resolution=True, resolution="480p")
    assert resolve_clip(wide, I2V, (100, 60)).size == (816, 496, 81)
    assert resolve_clip(ClipSettings(prompt="x"), I2V, (100, 60)).size == (1280, 720, 81)
    with pytest.raises(InputError, match="Crop the image"):
        resolve_clip(wide, I2V, (1, 20_000))


@dataclass(frozen=True, kw_only=True)
class WithText(ClipSettings):
    negative_prompt: str | None = settings._option(None, kinds.Text("text"), "Not to show.", "clip", row=True)


def test_a_new_option_is_one_entry_and_reaches_signature_rows_ids_and_metadata():
    @settings.accepts(WithText)
    def make(clip):
        """Make.

        Args:
            {options}
        """
        return resolve_clip(clip, NANO)

    assert "negative_prompt" in inspect.signature(make).parameters and "negative_prompt: Not to show." in make.__doc__
    assert options(WithText)["negative_prompt"].parse("negative_prompt", "a cat") == "a cat"
    clip, plain = make(prompt="x", negative_prompt="a cat"), make(prompt="x")
    assert clip.more == {"negative_prompt": "a cat"} and plain.more == {} and asdict(clip) != asdict(plain)
    record = records.VideoRecord(**asdict(clip))
    assert records.read(records.VideoRecord, json.loads(json.dumps(records.write(record)))).more == clip.more


def test_the_seeds_of_several_clips_stay_in_range():
    assert list(settings.seeds(3, 2)) == [3, 4]
    with pytest.raises(InputError, match="for 2 samples"):
        settings.seeds(settings.MAX_SEED, 2)


def test_functions_take_the_declared_options_with_their_defaults():
    load, make = (inspect.signature(f).parameters for f in (turbo_nb.load_pipeline, turbo_nb.generate))
    for parameters, cls in ((load, LoadOptions), (make, ClipSettings)):
        for name, one in cls.__dataclass_fields__.items():
            default = parameters[name].default
            assert default == one.default or (name == "prompt" and default is inspect.Parameter.empty)
    assert list(make)[:2] == ["pipeline", "prompt"] and next(iter(load)) == "model"
    for function, cls in ((turbo_nb.load_pipeline, LoadOptions), (turbo_nb.generate, ClipSettings)):
        assert all(f"{name}: {option.help}" in function.__doc__ for name, option in options(cls).items())


def test_the_command_line_has_every_option_where_it_makes_sense():
    commands = typer.main.get_command(cli.app).commands
    known = {name: {p.name: p for p in command.params} for name, command in commands.items()}
    everything = [name for cls in (LoadOptions, ClipSettings, RunOptions) for name in options(cls)]
    without = {
        "t2v": {
            "image",
            "last_image",
            "adaptive_resolution",
            "boundary",
            "extend",
            "extend_clip",
            "text_cache",
            "output_dir",
            "workers",
            "ray_address",
        },
        "i2v": {"checkpoint", "text_cache", "output_dir", "workers", "ray_address"},
        "batch": {"prompt", "extend_clip", "text_cache", "save_path", "grid"},
    }
    for command, missing in without.items():
        assert {name for name in everything if name not in known[command]} == missing, command
    assert {"high_noise_model", "low_noise_model"} <= known["i2v"].keys() & known["batch"].keys()


def test_help_shows_the_choices_and_the_declared_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = CliRunner().invoke(cli.app, ["t2v", "--help"]).output
    for words in ("sla, sagesla, original", "auto, resident, cpu-text", "cpu, cuda", "16:9"):
        assert words in text
    places = [text.index(f"─ {panel} ─") for panel in cli.PANELS.values()]
    assert places == sorted(places)


def test_plans_and_attention_types_are_those_that_exist():
    assert tuple(one.name for one in plan.PLANS) == settings.PLAN_NAMES[1:]
    hints = typing.get_type_hints(LoadOptions)
    assert set(typing.get_args(typing.get_args(hints["attention_type"])[0])) == set(settings.ATTENTION_TYPES)


def test_a_picture_in_memory_is_an_option_that_was_given():
    picture = np.zeros((2, 2, 3), np.uint8)
    given = settings.asked(ClipSettings(prompt="x", image=picture, last_image=picture))
    assert given["image"] is picture and given["last_image"] is picture


def test_the_seeds_of_the_last_sample_s_parts_are_checked_before_the_first_clip():
    line = ["i2v", "--prompt", "x", "--image_path", "none.png", "--extend", "2", "--num_samples", "3"]
    result = CliRunner().invoke(cli.app, [*line, "--seed", str(settings.MAX_SEED - 3)])
    assert f"at most {settings.MAX_SEED - 4} for 5 samples or parts" in str(result.exception)


@pytest.mark.parametrize(
    ("value", "values"),
    [(None, []), ("红圆", ["红圆"]), (0, [0]), ([1, 2], [1, 2]), ((), []), (range(2), [0, 1]), ({"a": 1}, [{"a": 1}])],
)
def test_a_single_value_needs_no_list(value, values):
    assert kinds.several(value) == values
