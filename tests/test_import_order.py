"""The rooms import one way, and importing the package does nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import turbo_nb

PACKAGE = Path(__file__).parents[1] / "turbo_nb"
ORDER = [
    ("errors",), ("catalog",), ("environment",), ("kernels",), ("backends",), ("rope", "scheduler"),
    ("linear",), ("sla",), ("fuse", "vae"), ("weights",), ("checkpoint",), ("download",), ("sources",), ("media",),
    ("estimate",), ("history",), ("offload",), ("plan",), ("auto",), ("text",), ("pipeline",),
    ("rope_study", "sla_study"), ("batch",), ("preflight",), ("verify",), ("studio",), ("ui",), ("cli",),
]  # fmt: skip
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms}


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
    names = {name[1] for name in found if name[0] == "turbo_nb" and len(name) > 1}
    return {turbo_nb._HOMES.get(name, name) for name in names} & PLACE.keys()


def test_every_module_has_its_room():
    rooms = {p.stem if p.parent == PACKAGE else p.parent.name for p in PACKAGE.rglob("*.py")} - {"__init__", "turbo_nb"}
    assert rooms <= PLACE.keys()


def test_imports_go_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        wrong += [f"{room} imports {other}" for other in imported_rooms(path) - {room} if PLACE[other] >= PLACE[room]]
    assert not wrong, wrong


def test_the_test_sees_an_import_inside_a_function(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "rope.py").write_text(
        "def f():\n    from .cli import main\n    import turbo_nb.pipeline\n    from . import ui\n"
        "    from turbo_nb import contact_sheet\n"
    )
    assert imported_rooms(tmp_path / "rope.py") == {"cli", "pipeline", "ui", "media"}


def test_importing_does_nothing(tmp_path):
    code = "import sys, turbo_nb; print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    environment = os.environ | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (result.stdout, result.stderr, list(tmp_path.iterdir())) == ("[]\n", "", [])
