"""Code blocks of README and docs as tests: sybil runs each in order, with the demo model, in a folder of sample files.

Python blocks of a document share a namespace. Bash blocks stop at the first failing command; `BUNDLE` is the demo. A block that
cannot be run here is preceded by `<!-- skip: next "REASON" -->`, and is reported as skipped with that reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

pytest_collect_file: Any = None
try:
    from sybil import Example, Sybil
    from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
except ImportError:  # environments for CUDA and OpenVINO run a part of the tests, with pytest alone
    collect_ignore_glob = ["*.md"]
else:
    ROOT = Path(__file__).parent
    SAMPLES = ROOT / "florence_onnx" / "demo" / "samples"

    def enter_folder(namespace: dict[str, Any]) -> None:
        """Goes to a new folder with the files that documents name."""
        folder = Path(tempfile.mkdtemp(prefix="florence-onnx-docs-"))
        for name, sample in (("car.jpg", "scene-1.png"), ("sign.png", "scene-2.png")):
            shutil.copy(SAMPLES / sample, folder / name)
        shutil.copytree(SAMPLES, folder / "florence_onnx" / "demo" / "samples")
        namespace["_left"], namespace["_folder"] = Path.cwd(), folder
        os.chdir(folder)

    def leave_folder(namespace: dict[str, Any]) -> None:
        """Goes back, and removes the folder."""
        os.chdir(namespace["_left"])
        shutil.rmtree(namespace["_folder"], ignore_errors=True)

    def run_bash(example: Example) -> str | None:
        """Runs a block; what failed and what it said is the message of the failure."""
        environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        script = str(example.parsed).replace("BUNDLE", "demo")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, env=environment
        )
        return None if done.returncode == 0 else f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"

    pytest_collect_file = Sybil(
        parsers=[PythonCodeBlockParser(), CodeBlockParser(language="bash", evaluator=run_bash), SkipParser()],
        patterns=["README.md", "docs/*.md"],
        setup=enter_folder,
        teardown=leave_folder,
    ).pytest()

if pytest_collect_file is None:
    del pytest_collect_file
