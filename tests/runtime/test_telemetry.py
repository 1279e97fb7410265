"""ONNX Runtime reports nothing: no look-up, no file, no thread that could do either later."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from florence_onnx.commands import doctor
from florence_onnx.runtime import telemetry

REPOSITORY = Path(__file__).resolve().parents[2]

LOAD = """
import os
from florence_onnx import Florence2
model = Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})
model.run("<CAPTION>", "florence_onnx/demo/samples/scene-1.png")
print("threads", len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1)
"""
"""Loads and runs the demo; the last line is how many threads there are then."""
PLAIN = """
import os, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession("florence_onnx/demo/bundle/text_encoder.onnx", options)
print("threads", len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1)
"""
"""Loads a graph without us."""

NETWORK = re.compile(r"\b(socket|connect|sendto|sendmsg|sendmmsg|bind)\(")
WRITES = re.compile(
    r"\b(mkdir|mkdirat|creat|rename|renameat2?|link|linkat|symlink|unlink|unlinkat)\(|O_WRONLY|O_RDWR|O_CREAT"
)
HARMLESS = ("/dev/null", "/dev/tty", "ENOENT")
"""What may be opened for writing: devices, and what is not there."""


def run(code: str, home: Path, *prefix: str, **variables: str) -> str:
    """Runs code in a process of its own with a home of its own; the variable is unset unless it is given.

    ONNX Runtime does not report where CI is set either, so that nothing would be shown there.
    """
    dropped = (telemetry.VARIABLE, "XDG_CACHE_HOME", "CI", "GITHUB_ACTIONS", "TF_BUILD")
    clean = {name: value for name, value in os.environ.items() if name not in dropped}
    environment = {**clean, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


def files(home: Path) -> list[str]:
    """What lies in a home."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*"))


def traced(code: str, home: Path, log: Path, **variables: str) -> list[str]:
    """The system calls by which a process reaches the network or writes; none leaves it: they fail as without a network."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("system calls are watched with strace: apt-get install strace")
    if subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not watch here: the kernel or the container forbids ptrace")
    calls = "-etrace=%network,%file,open,openat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat"
    offline = "-einject=connect,sendto,sendmsg,sendmmsg:error=ENETUNREACH"
    run(code, home, strace, "-f", "-qq", "-o", str(log), calls, offline, **variables)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    assert len(lines) > 100
    found = [line for line in lines if NETWORK.search(line) or WRITES.search(line)]
    return [line for line in found if not any(each in line for each in HARMLESS)]


def test_a_load_makes_no_look_up_and_no_file(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert traced(LOAD, home, tmp_path / "log") == []
    assert files(home) == []


def test_the_same_shows_the_reports_where_they_are_on(tmp_path: Path) -> None:
    """Without this, nothing would say that the test above can see them."""
    if tuple(map(int, metadata.version("onnxruntime").split(".")[:2])) < (1, 32):
        pytest.skip("older versions of ONNX Runtime report nothing: pip install 'onnxruntime>=1.32'")
    home = tmp_path / "home"
    home.mkdir()
    calls = traced(LOAD, home, tmp_path / "log", **{telemetry.VARIABLE: "0"})
    assert any("Microsoft" in line for line in calls)
    assert any("Microsoft" in name for name in files(home))


def test_without_strace_too_nothing_is_written_and_no_thread_waits(tmp_path: Path) -> None:
    """The reports are sent by threads, seconds after a load."""
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.mkdir(), ours.mkdir()
    quiet = run(PLAIN, plain, **{telemetry.VARIABLE: "1"})
    assert run(LOAD, ours) == quiet == "threads 1\n"
    assert files(plain) == files(ours) == []


IMPORTS = """
import os, sys
def watch(event, arguments):
    if event == "import" and arguments[0] == "onnxruntime":
        print("variable", os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.addaudithook(watch)
import {module}
assert "onnxruntime" in sys.modules
"""


@pytest.mark.parametrize("module", ["export.precisions.fp16", "benchmarks.gpu.graphs"])
def test_it_is_set_before_the_export_and_the_benchmarks_import_onnxruntime(module: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch and transformers: pip install -e '.[export]'")
    said = run(IMPORTS.format(module=module), tmp_path).splitlines()
    assert set(said) == {"variable 1"}


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    code = "import os, florence_onnx; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(code, tmp_path) == "1\n"
    for value in ("0", "", "yes"):
        assert run(code, tmp_path, **{telemetry.VARIABLE: value}) == f"{value}\n"


REPORT = """
{before}
from florence_onnx.commands import doctor
section = doctor.attempt(doctor._onnxruntime)
print(section["reports"])
print(*[line for line in doctor._format_onnxruntime(section) if "reports" in line])
"""


def test_doctor_says_when_onnxruntime_was_imported_before_us(tmp_path: Path) -> None:
    said = run(REPORT.format(before="import onnxruntime"), tmp_path)
    assert said.startswith("may report to its makers (1.32 does): it was imported before florence_onnx")
    assert "  reports         may report to its makers" in said.splitlines()[1]
    known = run(REPORT.format(before="import onnxruntime"), tmp_path, **{telemetry.VARIABLE: "1"})
    assert known == run(REPORT.format(before=""), tmp_path) == "None\n\n"


@pytest.mark.parametrize(("value", "is_off"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("", False)])
def test_doctor_says_when_the_user_wants_the_reports(value: str, is_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(telemetry.VARIABLE, value)
    assert (telemetry.problem() is None) is is_off
    assert doctor.environment(os.environ)[telemetry.VARIABLE] == value
