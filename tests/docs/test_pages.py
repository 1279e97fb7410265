"""What the pages of the manual promise: printed answers, figures, public names in the API reference, tables that fit."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

import florence_onnx

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
MAX_COLUMNS = 5
MAX_CODE_COLUMNS = 100
"""What a page shows without a horizontal scroll bar; see docs/stylesheets/extra.css."""
MODULES = ("tasks", "fal", "compat", "image", "postprocess")
"""Modules that docs/inputs-and-errors.md calls public."""


def read(path: Path) -> str:
    """The text of a file."""
    return path.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def test_readme_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first Python block prints, to the digit, the text block after it, and is short."""
    monkeypatch.chdir(ROOT)
    code, shown = blocks(ROOT / "README.md", "python")[0], blocks(ROOT / "README.md", "text")[0]
    assert len([line for line in code.splitlines() if line]) <= 6
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown


def test_image_of_readme_is_a_drawing_of_the_product() -> None:
    """The image at the top is what `florence-onnx demo` writes today, but for the compression of the PNG."""
    from PIL import Image, ImageChops

    model = florence_onnx.Florence2.from_pretrained("demo", device="cpu")
    sample = ROOT / "florence_onnx" / "demo" / "samples" / "scene-1.png"
    drawn = model.run("object-detection", str(sample)).draw().convert("RGB")
    with Image.open(ROOT / "docs" / "images" / "demo.png") as image:
        assert image.size == drawn.size
        assert ImageChops.difference(image.convert("RGB"), drawn).getbbox() is None


SPEED_ROWS = {
    "transformers, fp32": "transformers-fp32",
    "plain ONNX export": "plain-onnx",
    "OpenVINO, fp32": "openvino-fp32",
    "florence_onnx, fp32": "ours-fp32",
    "florence_onnx, int8": "ours-int8",
}
"""Rows of README's table of speed, and the peers of the recorded result that they are about."""


def test_speed_of_readme_is_the_recorded_one() -> None:
    """Times and memory of README's table are the medians of the result that it names."""
    report = read(RESULTS / "2026-11-24-amd-epyc-2threads-base.md")
    medians = table(report[report.index("## Medians") :])
    rows = {row[0]: row[1:] for row in table(read(ROOT / "README.md"), heading="| | greedy")[1:]}
    columns = [medians[0].index(name) for name in ("end to end greedy s", "end to end beams s", "peak MB")]
    recorded = {row[0]: [row[column] for column in columns] for row in medians[1:]}
    assert set(rows) == set(SPEED_ROWS)
    for name, peer in SPEED_ROWS.items():
        greedy, beams, memory = recorded[peer]
        assert [rows[name][0], rows[name][1], rows[name][3]] == [f"{greedy} s", f"{beams} s", f"{memory} MB"], name


def table(text: str, heading: str = "|") -> list[list[str]]:
    """The cells of the first table whose heading begins so, without the line under the heading."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(heading))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def test_precisions_are_the_recorded_ones() -> None:
    """The scores of docs/precision-and-speed.md are those of the recorded run."""
    recorded = table(read(RESULTS / "precisions_demo.md"), heading="| bundle")
    scores = {(row[1], row[2]): row[3] for row in recorded[1:]}
    shown = table(read(ROOT / "docs" / "precision-and-speed.md"), heading="| | fp32")
    for row in shown[1:]:
        beams = {"greedy": "1", "three beams": "3"}[row[0]]
        assert row[1:] == [scores[precision, beams] for precision in shown[0][1:]]


def test_tasks_are_those_of_the_package() -> None:
    """docs/tasks.md lists every task, in the order of the package, with its token and what it takes."""
    rows = table(read(ROOT / "docs" / "tasks.md"), heading="| slug")[1:]
    expected = [
        [f"`{task.slug}`", f"`{task.token}`", "" if task.needs == "nothing" else task.needs]
        for task in florence_onnx.tasks.TASKS.values()
    ]
    assert sorted(row[:3] for row in rows) == sorted(expected)


@pytest.mark.parametrize("name", [name for name in florence_onnx.__all__ if not name.startswith("__")])
def test_public_name_is_in_the_api_reference(name: str) -> None:
    """By itself, or in a module that is there as a whole."""
    page = read(ROOT / "docs" / "api.md")
    is_error = isinstance(getattr(florence_onnx, name), type) and issubclass(getattr(florence_onnx, name), Exception)
    assert f"::: florence_onnx.{'errors' if is_error else name}\n" in page


@pytest.mark.parametrize("name", MODULES)
def test_public_module_has_its_names(name: str) -> None:
    """Each is named where the manual says what is public, is in the API reference, and has what its `__all__` says."""
    assert f"`florence_onnx.{name}`" in read(ROOT / "docs" / "inputs-and-errors.md")
    assert f"::: florence_onnx.{name}" in read(ROOT / "docs" / "api.md")
    module = importlib.import_module(f"florence_onnx.{name}")
    for each in getattr(module, "__all__", ()):
        assert getattr(module, each) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_at_most_five_columns(page: Path) -> None:
    """More do not fit beside the navigation."""
    separators = re.findall(r"^\|(?:\s*:?-+:?\s*\|)+$", read(page), re.MULTILINE)
    assert all(separator.count("|") - 1 <= MAX_COLUMNS for separator in separators)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_code_fits_the_page(page: Path) -> None:
    """Commands and code are seen whole; printed tables may be wider."""
    lines = [line for language in ("python", "bash") for code in blocks(page, language) for line in code.splitlines()]
    assert [line for line in lines if len(line) > MAX_CODE_COLUMNS] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run_or_say_why_not(page: Path) -> None:
    """Sybil (conftest.py) runs blocks of two languages; the others hold output, and a skipped block has its reason."""
    languages = set(re.findall(r"^```(\w+)$", read(page), re.MULTILINE))
    assert languages <= {"python", "bash", "text", "json"}
    for comment in re.findall(r"<!--(.*?)-->", read(page), re.DOTALL):
        assert re.fullmatch(r' skip: next "[^"]{10,}" ', comment), comment


def test_no_page_names_a_machine_or_a_registry() -> None:
    """Hosts of package registries differ between readers, and paths of one machine mean nothing on another."""
    found = re.compile(r"pypi\.org|pythonhosted|registry\.npmjs|/home/|/root/|/work/")
    for path in [*PAGES, *ROOT.glob("*.md"), *(ROOT / "examples").glob("*.py"), ROOT / "mkdocs.yml"]:
        assert found.search(read(path)) is None, path


def test_navigation_has_every_page() -> None:
    """A page that mkdocs.yml does not list would be built, and found by nobody."""
    navigation = set(re.findall(r": ([\w-]+\.md)$", read(ROOT / "mkdocs.yml"), re.MULTILINE))
    assert navigation == {page.name for page in PAGES[1:]}
