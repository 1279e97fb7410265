"""Who imports whom in `export` and `benchmarks`: the order of the rooms, and what stands outside of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

EXPORT: dict[str, set[str]] = {
    "checkpoints": set(),
    "graphs": {"checkpoints"},
    "precisions": {"graphs"},
    "verification": {"checkpoints", "graphs"},
    "bundles": {"checkpoints", "graphs", "precisions", "verification"},
    "transformers_js": {"bundles", "checkpoints", "graphs", "precisions", "verification"},
    "publishing": set(),
    "published": {"bundles", "checkpoints", "verification"},
    "demo": {"checkpoints"},
    "commands": {"bundles", "checkpoints", "precisions", "published", "publishing", "transformers_js", "verification"},
    "__main__": {"commands"},
    "__init__": set(),
}
"""What each room of `export` may import: rooms that stand before it in this table."""

BENCHMARKS: dict[str, set[str]] = {
    "costs": set(),
    "machine": set(),
    "results_file": set(),
    "checkpoints": set(),
    "models": {"checkpoints", "costs"},
    "cpu": {"checkpoints", "costs", "machine", "models", "results_file"},
    "gpu": {"costs", "machine", "models"},
    "serving": {"machine", "models"},
    "quality": {"machine", "results_file"},
    "__init__": set(),
}
"""The same for `benchmarks`: what each question (cpu, gpu, …) is measured with, and none imports another."""

TREES = {"export": EXPORT, "benchmarks": BENCHMARKS}
ROOMS = [(tree, room) for tree, rooms in TREES.items() for room in rooms]


def sources(tree: str, room: str) -> list[Path]:
    """The files of a room: one module, or those of a folder."""
    folder = REPOSITORY / tree / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, also inside functions and for the type checker."""
    package = path.relative_to(REPOSITORY).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms_in(tree: str, modules: set[str]) -> set[str]:
    """The rooms of a tree among some modules."""
    return {name.split(".")[1] for name in modules if name.startswith(f"{tree}.")}


@pytest.mark.parametrize(("tree", "room"), ROOMS)
def test_rooms_import_only_what_the_table_allows(tree: str, room: str) -> None:
    found = {name for path in sources(tree, room) for name in imports(path)}
    assert rooms_in(tree, found) - {room} <= TREES[tree][room]


@pytest.mark.parametrize("tree", TREES)
def test_imports_go_one_way_only(tree: str) -> None:
    before: set[str] = set()
    for room, allowed in TREES[tree].items():
        assert allowed <= before, room
        before.add(room)


@pytest.mark.parametrize("tree", TREES)
def test_every_module_has_a_room(tree: str) -> None:
    folder = REPOSITORY / tree
    found = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert found == set(TREES[tree])


@pytest.mark.parametrize("room", EXPORT)
def test_export_needs_neither_benchmarks_nor_tests(room: str) -> None:
    """It is installed without them, as `florence_onnx.export`, and so imports its own modules relatively."""
    for path in sources("export", room):
        assert not {name.split(".")[0] for name in imports(path)} & {"benchmarks", "tests"}, path
        absolute = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        for node in absolute:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not [name for name in names if name.split(".")[0] == "export"], path


def test_the_runtime_needs_neither_export_nor_benchmarks() -> None:
    for path in (REPOSITORY / "florence_onnx").rglob("*.py"):
        found = imports(path)
        assert not {name.split(".")[0] for name in found} & {"export", "benchmarks", "tests"}, path
        assert not [name for name in found if name.startswith("florence_onnx.export")], path


@pytest.mark.parametrize(("tree", "room"), [(t, r) for t, r in ROOMS if (REPOSITORY / t / r).is_dir()])
def test_rooms_say_what_they_are_for(tree: str, room: str) -> None:
    content = (REPOSITORY / tree / room / "__init__.py").read_text(encoding="utf-8")
    assert len(ast.get_docstring(ast.parse(content)) or "") > 40


@pytest.mark.parametrize(("tree", "room"), ROOMS)
def test_modules_of_a_room_make_no_circle(tree: str, room: str) -> None:
    paths = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in sources(tree, room)}
    graph = {
        module: {other for other in paths for name in imports(path) if f"{name}.".startswith(f"{other}.")} - {module}
        for module, path in paths.items()
    }
    while leaves := {module for module, found in graph.items() if not found & graph.keys()}:
        graph = {module: found for module, found in graph.items() if module not in leaves}
    assert graph == {}
