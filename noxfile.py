"""What CI runs, session by session: `nox -l` lists them, `nox -s lint` runs one, `.ci/run` runs them all.

`lint`, `types`, `slow`, `cluster` and `tests` use the environment of README's test command, `.venv-test`; `nox -s
environment` makes it. The others have environments of their own, because two packages that bring the module onnxruntime break each other.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "docs", "tests"]

ROOT = Path(__file__).parent
TEST_COMMAND = re.search(r"^python3 -m venv \.venv-test && .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
"""README's test command: makes an environment, installs into it, tests."""
PYTHON = ".venv-test/bin/python"
BUNDLES = Path(os.environ.get("FLORENCE_ONNX_KEEP_BUNDLES", ROOT / ".bundles"))
"""Where exports lie that several environments look at."""
DEMO = "florence_onnx/demo/bundle"


def test_command() -> str:
    """README's test command."""
    if TEST_COMMAND is None:
        raise RuntimeError("README.md has no line that begins with: python3 -m venv .venv-test")
    return TEST_COMMAND[0]


@nox.session(venv_backend="none")
def environment(session: nox.Session) -> None:
    """Makes .venv-test: README's test command up to its last step."""
    session.run_install("bash", "-c", test_command().rpartition(" && ")[0], external=True)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """ruff: rules and format."""
    session.run(PYTHON, "-m", "ruff", "check", ".", external=True)
    session.run(PYTHON, "-m", "ruff", "format", "--check", ".", external=True)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """mypy --strict."""
    session.run(PYTHON, "-m", "mypy", external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """README's test command as it stands; more arguments go to pytest."""
    session.run("bash", "-c", " ".join([test_command(), *session.posargs]), external=True)


@nox.session(venv_backend="none")
def slow(session: nox.Session) -> None:
    """Florence-2-base at full size, once, kept for `cuda`."""
    environment = {"FLORENCE_ONNX_KEEP_BUNDLES": str(BUNDLES)}
    arguments = session.posargs or ["-k", "base"]
    session.run(PYTHON, "-m", "pytest", "-m", "slow", "-n", "0", *arguments, env=environment, external=True)


@nox.session(venv_backend="none")
def cluster(session: nox.Session) -> None:
    """A batch job on a cluster of two Ray nodes on this computer: killed workers, nodes and jobs."""
    session.run(PYTHON, "-m", "pytest", "-m", "cluster", "-n", "0", "tests/ray", *session.posargs, external=True)


@nox.session
def cuda(session: nox.Session) -> None:
    """CUDA and TensorRT without a GPU: where graphs land, what is captured, what the parser takes. Run `slow` before."""
    # 1.31 is what the lists of nodes were read from
    session.install("pytest", "onnx", "-e", ".[gpu]", "onnxruntime-gpu==1.31.1", "tensorrt-rtx==1.7.1.116")
    small = session.run(PYTHON, "-m", "tests.exported_bundles", str(BUNDLES), external=True, silent=True)
    # warnings of transformers come with it; the folders are the last line
    bundles, engines = [DEMO, str(small).strip().splitlines()[-1]], [DEMO, str(BUNDLES / "tiny" / "fp32")]
    base = BUNDLES / "base" / "fp32"
    if base.is_dir():
        bundles.append(str(base))
        engines.append(str(base))
    _test_without_torch(
        session,
        *("tests/cuda", "tests/runtime/test_cuda.py", "tests/runtime/test_tensorrt.py", "tests/runtime/test_engine.py"),
        FLORENCE_ONNX_TEST_BUNDLES=os.pathsep.join(bundles),
        FLORENCE_ONNX_TEST_ENGINES=os.pathsep.join(engines),
    )


@nox.session
def openvino(session: nox.Session) -> None:
    """OpenVINO's build of ONNX Runtime."""
    session.install("pytest", "-e", ".[openvino]")
    _test_without_torch(session, "tests/runtime/test_cpu.py", "tests/runtime/test_engine.py")


@nox.session
def docs(session: nox.Session) -> None:
    """The manual; a warning is an error."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict")


def _test_without_torch(session: nox.Session, *paths: str, **variables: str) -> None:
    """Runs tests where pytest has no plugins: without the options of pyproject.toml that need them."""
    session.run("python", "-m", "pytest", "-o", "addopts=-rfExX --strict-markers", *paths, env=variables)
