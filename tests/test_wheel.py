"""The built wheel: what it holds, and that it works in fresh environments without torch, with the newest dependencies and the oldest."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 reads pyproject.toml with tomli")

REPOSITORY = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = "3.10"
EXTRAS = ("cpu", "cli", "serve")


def run(*command: str | Path) -> str:
    """Runs a command outside the checkout, so that nothing is imported from it."""
    done = subprocess.run([*map(str, command)], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def make_environment(interpreter: str, folder: Path) -> Path:
    """An empty environment; returns its interpreter. `install` needs no pip in it, which takes seconds to get there."""
    run(interpreter, "-m", "venv", "--without-pip", folder)
    return folder / "bin" / "python"


def install(python: Path, *requirements: str | Path) -> None:
    """As `python -m pip install` does it, but with this environment's pip, and without compiling what is not imported."""
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile", *requirements)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build folder behind."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "__pycache__")
    shutil.copytree(REPOSITORY, copy, ignore=ignored)
    output = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", output, copy)
    (found,) = output.glob("*.whl")
    return found


NOT_SHIPPED = ("florence_onnx/export/demo/checkpoint/",)
"""Folders of the packages that stay out of the wheel on purpose: the demo's weights, from which its bundle was exported."""


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    """pyproject.toml lists packages and data by hand: a new folder must not be forgotten there."""
    packages = {"florence_onnx": REPOSITORY / "florence_onnx", "florence_onnx/export": REPOSITORY / "export"}
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in packages.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == {name for name in expected if not name.startswith(NOT_SHIPPED)}


def oldest_requirements() -> list[str]:
    """Each lower bound of pyproject.toml as an exact version."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(item for extra in EXTRAS for item in project["optional-dependencies"][extra])]
    return [re.sub(r">=\s*", "==", item) for item in wanted if not item.startswith("florence-onnx")]


def oldest_interpreter() -> str:
    """The oldest supported Python on this machine, else the running one."""
    installed = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{OLDEST_PYTHON}*/bin/python"))
    candidates = [str(path) for path in installed] + [f"python{OLDEST_PYTHON}"]
    return next((python for python in candidates if is_oldest(python)), sys.executable)


def is_oldest(python: str) -> bool:
    """Whether an interpreter exists and runs: pyenv's shims exist for versions that are not active."""
    if shutil.which(python) is None:
        return False
    done = subprocess.run([python, "--version"], capture_output=True, text=True, check=False)
    return f"Python {OLDEST_PYTHON}." in done.stdout


SERVING = """
import signal, subprocess, sys, time, urllib.request
command = [sys.executable, "-m", "florence_onnx", "serve", "--port", "0"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
for line in server.stderr:
    if "listening on" in line:
        break
base = line[line.index("http://"):].split('"')[0]
assert b"app.js" in urllib.request.urlopen(base).read()
assert b"florence_queue_depth" in urllib.request.urlopen(base + "/metrics").read()
server.send_signal(signal.SIGTERM)
assert server.wait(30) == 0
"""
"""The page and the figures, from what is installed, on a free port that the log names."""


def try_out(python: Path, directory: Path) -> str:
    """Runs the demo as a user would and checks what it says; returns the versions in use."""
    answer = json.loads(run(python, "-m", "florence_onnx", "demo", "--output", directory / "annotated.png"))
    assert answer["results"]["bboxes"] and set(answer["results"]["bboxes"][0]) == {"x", "y", "w", "h", "label"}
    assert (directory / "annotated.png").stat().st_size > 1000
    run(python, "-c", SERVING)
    code = (
        "import importlib.util, sys, florence_onnx, numpy, PIL, onnxruntime, tokenizers\n"
        "assert not any(importlib.util.find_spec(name) for name in ('torch', 'transformers', 'optimum'))\n"
        "assert 'site-packages' in florence_onnx.__file__\n"
        "print(sys.version_info[:2], numpy.__version__, PIL.__version__, onnxruntime.__version__, tokenizers.__version__)"
    )
    return run(python, "-c", code)


def test_newest_dependencies(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(sys.executable, tmp_path / "env")
    install(python, f"{wheel}[{','.join(EXTRAS)}]")
    print(try_out(python, tmp_path))
    assert "florence-onnx-export" in run(sys.executable, "-m", "pip", "--python", python, "show", "-f", "florence-onnx")
    # The export's transformers holds huggingface_hub below 1, so only here does the newest client meet the runtime.
    install(python, "pytest")
    without_plugins = ("-p", "no:cacheprovider", "-o", "addopts=--strict-markers")
    tests = [REPOSITORY / "tests" / "bundles" / name for name in ("test_hub.py", "test_bundle.py")]
    run(
        python,
        "-m",
        "pytest",
        "-q",
        *without_plugins,
        "--rootdir",
        REPOSITORY,
        "-c",
        REPOSITORY / "pyproject.toml",
        *tests,
    )


def test_oldest_dependencies(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(oldest_interpreter(), tmp_path / "env")
    install(python, f"{wheel}[{','.join(EXTRAS)}]", *oldest_requirements())
    versions = try_out(python, tmp_path)
    print(versions)
    assert all(
        requirement.split("==")[1] in versions for requirement in oldest_requirements()[:4] if "==" in requirement
    )
