"""What each room imports is what the table in docs/architecture.md says it may."""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
HARNESS = REPO / "harness"
ROW = re.compile(r"^\| `([a-z]+)` \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)


def table() -> dict[str, set[str]]:
    """What every room may import: rooms, or modules of one such as ``calib.conf``."""
    text = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text[text.index("| room | owns | may import |") :].split("\n\n")[0]
    return {room: set(re.findall(r"`([a-z.]+)`", allowed)) for room, allowed in ROW.findall(section)}


def rooms() -> list[str]:
    return sorted(path.parent.name for path in HARNESS.glob("*/__init__.py"))


def imported(source: str) -> set[str]:
    """Modules of the package that a file imports, without ``harness.``, those within functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            whole = node.module == "harness" or (HARNESS / node.module.partition(".")[2].replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return {name.removeprefix("harness.") for name in found if name.startswith("harness.")}


def refused(room: str, modules: set[str], allowed: set[str]) -> list[str]:
    beside = {path.stem for path in HARNESS.glob("*.py")}
    others = {m for m in modules if m.split(".")[0] not in {room, *beside}}
    return sorted(m for m in others if not any(m == known or m.startswith(f"{known}.") for known in allowed))


def test_every_room_has_a_row_and_every_row_a_room():
    assert sorted(table()) == rooms()


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_what_its_row_allows(room):
    allowed = table()[room]
    problems = [
        f"{path.relative_to(REPO)} imports {name}"
        for path in sorted((HARNESS / room).rglob("*.py"))
        for name in refused(room, imported(path.read_text(encoding="utf-8")), allowed)
    ]
    assert not problems, "\n".join([*problems, f"{room} may import {', '.join(sorted(allowed)) or 'no room'}"])


def test_no_room_imports_one_that_stands_above_it():
    """The table goes from the ground floor up; only a module by name, with no more behind it, may lie above."""
    order = list(table())
    upward = [
        (room, other)
        for room, allowed in table().items()
        for other in allowed
        if "." not in other and order.index(other) >= order.index(room)
    ]
    assert not upward
    for allowed in table().values():
        for module in (other for other in allowed if "." in other):
            source = (HARNESS / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            assert not refused(module.split(".")[0], imported(source), allowed), module


def test_what_is_not_allowed_is_found():
    source = "from harness.rollout import Rollout\ndef f():\n    import harness.kv.cache\n    from harness import ab\n"
    assert imported(source) == {"rollout.Rollout", "kv.cache", "ab"}
    assert refused("kv", {"kv.cache", "rollout.Rollout", "calib.conf", "calib.gptq"}, {"calib.conf"}) == [
        "calib.gptq",
        "rollout.Rollout",
    ]
