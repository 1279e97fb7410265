"""The manual: README's length, relative links, and the public names."""

import importlib
import re
from pathlib import Path

import pytest

import florence_onnx

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def test_readme_has_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    targets = LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
    broken = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert broken == []


@pytest.mark.parametrize("name", florence_onnx.__all__)
def test_public_name_imports(name: str) -> None:
    assert getattr(florence_onnx, name) is not None


DOTTED = re.compile(r"\bflorence_onnx(?:\.[A-Za-z_]\w*)+")
NOT_MODULES = {"florence_onnx.json", "florence_onnx.png"}
"""Files of that name."""


def _resolve(dotted: str) -> object:
    """The module, class or function of a dotted name; raises ImportError or AttributeError where there is none."""
    found: object = florence_onnx
    path = "florence_onnx"
    for name in dotted.split(".")[1:]:
        path = f"{path}.{name}"
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError:
            found = getattr(found, name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_names_exist(page: Path) -> None:
    names = set(DOTTED.findall(page.read_text(encoding="utf-8"))) - NOT_MODULES
    for name in names:
        if name.endswith(".__all__") or not name.startswith("florence_onnx.export"):
            assert _resolve(name) is not None, name


STEP = re.compile(r"`((?:export\.)?[a-z_]+(?:\.[A-Za-z_]\w*)+)`")


def test_the_steps_of_the_walks_exist() -> None:
    """Every `module.name` of the architecture page's walks, in one of the rooms or in the export."""
    pytest.importorskip("torch", reason="the walk of a weight goes through the export: pip install -e '.[export]'")
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walks = text[text.index("## Four walks") : text.index("## How to add")]
    steps = [step for step in STEP.findall(walks) if not step.endswith((".onnx", ".data"))]
    assert len(steps) > 20
    missing = [step for step in steps if not _exists(step)]
    assert missing == []


def _exists(step: str) -> bool:
    """Whether a step is in the package, in one of its rooms, or an attribute of a class that a room has."""
    if step.startswith("export."):
        return _found(step)
    rooms = [path.name for path in (ROOT / "florence_onnx").iterdir() if path.is_dir() and path.name != "__pycache__"]
    return (
        any(_found(f"florence_onnx.{prefix}{step}") for prefix in ("", *(f"{room}." for room in rooms)))
        or any(
            _found(f"florence_onnx.{room}.{module.stem}.{step}")
            for room in rooms
            for module in (ROOT / "florence_onnx" / room).glob("*.py")
        )
        or any(_found(f"florence_onnx.{module}.{step}") for module in ("model", "tasks", "prediction"))
    )


def _found(dotted: str) -> bool:
    module, found = "", None
    for name in dotted.split("."):
        module = f"{module}.{name}" if module else name
        try:
            found = importlib.import_module(module)
        except ImportError:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
    return found is not None
