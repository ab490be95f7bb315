"""The rooms import one way, and importing the package does nothing."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import turbo_nb

PACKAGE = Path(__file__).parents[1] / "turbo_nb"
# Each row may import the rows above it. A name with a dot is one module of a room whose modules stand in several rows.
ORDER = [
    ("errors",), ("catalog", "terminal", "values"), ("settings", "records"), ("machine",), ("ops",), ("backends",),
    ("rope", "scheduler", "tiny_decoder"), ("linear",), ("sla",), ("shims",), ("fused",), ("files",),
    ("layerwise",), ("checkpoint",), ("files.convert",),
    ("text", "video"), ("runtime",),
    ("parallel",), ("files.hub",), ("files.remote",), ("files.decide", "files.locate"), ("files.resolve",),
    ("files.download",), ("wan",), ("presets", "pipeline", "preparation"), ("generation",),
    ("batch", "checkup", "study"), ("generator",), ("cli",),
]  # fmt: skip
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms}


def room_of(module: tuple[str, ...]) -> str | None:
    """The room of ORDER that a module (its path within the package) is in"""
    return next((name for name in (".".join(module[:2]), module[0]) if name in PLACE), None)


def imported_rooms(path: Path) -> set[str]:
    """Rooms of turbo_nb that a file imports, at the top or inside a function, by its own or a public name."""
    here = ("turbo_nb", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            found |= {module, *((*module, alias.name) for alias in node.names)}
    paths = {name[1:] for name in found if name[0] == "turbo_nb" and len(name) > 1}
    homes = {tuple(turbo_nb._HOMES[path[0]].split(".")) if path[0] in turbo_nb._HOMES else path for path in paths}
    deepest = {path for path in homes if not any(other != path and other[: len(path)] == path for other in homes)}
    return {room for path in deepest if (room := room_of(path))}


def test_every_module_has_its_room():
    modules = (path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py"))
    assert [module for module in modules if module != ("__init__",) and not room_of(module)] == []


def test_imports_go_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").parts
        if module == ("__init__",):
            continue
        room = room_of(module)
        wrong += [f"{room} imports {other}" for other in imported_rooms(path) - {room} if PLACE[other] >= PLACE[room]]
    assert not wrong, wrong


def test_the_test_sees_an_import_inside_a_function(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "rope.py").write_text(
        "def f():\n    from .cli import main\n    import turbo_nb.pipeline\n    from .generator import widgets\n"
        "    from turbo_nb import contact_sheet\n"
    )
    assert imported_rooms(tmp_path / "rope.py") == {"cli", "pipeline", "generator", "video"}


def test_importing_does_nothing(tmp_path):
    code = "import sys, turbo_nb; print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    environment = os.environ | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (result.stdout, result.stderr, list(tmp_path.iterdir())) == ("[]\n", "", [])


NANO = PACKAGE / "assets/nano"
HEAVY = {"transformers", "diffusers", "peft", "accelerate", "sentencepiece", "matplotlib", "ray"}


COMMANDS = [
    "--version", "--help", "t2v --help", "convert --help", "download nano", "download owner/repo", "doctor",
    f"info {NANO}", f"info {NANO / 'text_encoder'}", "batch missing.txt", "t2v --prompt x --save_path missing.txt",
    "i2v --image_path missing.png --prompt x", f"info {__file__}", "verify missing", f"verify {__file__}",
    f"t2v --prompt x --dit_path {__file__}", f"t2v --prompt x --vae_path {__file__}",
    f"t2v --prompt x --model nano --lora {__file__}", f"convert {__file__} folder",
    f"convert {NANO / 'vae'} {__file__}", f"convert {NANO / 'vae'} folder --lora missing.safetensors",
    f"convert {NANO / 'vae'} folder --low-noise",
]  # fmt: skip


def test_commands_without_a_model_import_no_library_of_models(tmp_path):
    code = f"""
import json, sys
from contextlib import suppress
from turbo_nb.cli import main
found = {{}}
for command in {COMMANDS}:  # in one process, because torch takes seconds
    sys.argv = ["turbo-nb", *command.split()]
    with suppress(SystemExit):
        main()
    found[command] = sorted({HEAVY} & sys.modules.keys())
with open("found.json", "w") as file:
    json.dump(found, file)
"""
    environment = os.environ | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "found.json").read_text()) == {command: [] for command in COMMANDS}
