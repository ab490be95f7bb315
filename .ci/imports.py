"""Draw which room of turbo_nb imports which, as a Mermaid block for CONTRIBUTING.md.

    python .ci/imports.py            # print the block
    python .ci/imports.py --write    # replace the block in CONTRIBUTING.md

tests/test_import_order.py has the rooms and their order. An arrow points from a room to a room that it imports. An
arrow is left out if other arrows lead the same way, because the picture would otherwise be too full to read.
"""

import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
_spec = importlib.util.spec_from_file_location("import_order", ROOT / "tests/test_import_order.py")
order = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(order)


def edges() -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    found = {room: set() for row in order.ORDER for room in row}
    for path in order.PACKAGE.rglob("*.py"):
        module = path.relative_to(order.PACKAGE).with_suffix("").parts
        if module != ("__init__",):
            room = order.room_of(module)
            found[room] |= order.imported_rooms(path) - {room}
    return found


def reachable(graph: dict[str, set[str]], room: str) -> set[str]:
    """Return all rooms that a room imports, directly or through others."""
    found, waiting = set(), [room]
    while waiting:
        for other in graph[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


def picture() -> str:
    """Return the Mermaid block. Raises SystemExit for a cycle or an arrow to a later room."""
    graph = edges()
    upward = [f"{a} imports {b}" for a in graph for b in graph[a] if order.PLACE[b] >= order.PLACE[a]]
    if upward:
        raise SystemExit(f"imports go the wrong way: {', '.join(upward)}. Expected only imports of earlier rooms.")
    lines = ["```mermaid", "flowchart TD"]
    for room in sorted(graph, key=lambda room: (-order.PLACE[room], room)):
        indirect = set().union(*(reachable(graph, other) for other in graph[room]))
        if direct := sorted(graph[room] - indirect):
            lines.append(f"  {room} --> {' & '.join(direct)}")
    return "\n".join([*lines, "```"])


def replaced(text: str) -> str:
    """Return the text of CONTRIBUTING.md with the picture of today."""
    return re.sub(r"```mermaid\n.*?```", lambda _: picture(), text, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        page = ROOT / "CONTRIBUTING.md"
        page.write_text(replaced(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(picture())
