"""`florence-onnx doctor`: the report of this installation, and of installations that are broken in known ways."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs: pip install 'florence-onnx[cli]'")
pytest.importorskip("onnxruntime", reason="the demo model runs on ONNX Runtime: pip install 'florence-onnx[cpu]'")

from typer.testing import CliRunner

from florence_onnx import __version__
from florence_onnx.bundles.bundle import DEMO_DIRECTORY
from florence_onnx.commands import doctor
from florence_onnx.commands.main import app
from florence_onnx.runtime import cuda

REPOSITORY = Path(__file__).parents[2]
SECTIONS = ("system", "packages", "onnxruntime", "devices", "extras", "caches", "environment", "self_test")

needs_demo = pytest.mark.skipif(not DEMO_DIRECTORY.is_dir(), reason="the demo bundle is not built in this checkout")


@needs_demo
def test_the_report_of_this_installation() -> None:
    keys = {"FAL_KEY": "fal-very-secret", "FLORENCE_ONNX_API_KEY": "own-very-secret"}
    variables = {**os.environ, **keys, "FLORENCE_ONNX_GRAPH_CACHE": "/no/such/folder", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "florence_onnx", "doctor", "--json"],
        cwd=REPOSITORY,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "very-secret" not in result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert list(report) == ["florence_onnx", *SECTIONS]
    assert report["florence_onnx"] == __version__
    assert [name for name in SECTIONS if "error" in report[name]] == []
    assert report["system"]["python"].startswith(sys.version.split()[0]) and report["system"]["cores"] >= 1
    assert report["packages"]["numpy"] == metadata.version("numpy")
    assert "CPUExecutionProvider" in report["onnxruntime"]["providers"]
    assert list(report["devices"]) == ["cpu", "cuda", "tensorrt", "openvino"]
    assert report["devices"]["cpu"]["works"] and report["self_test"]["works"]
    assert all(device["works"] or device.get("reason") or device.get("error") for device in report["devices"].values())
    assert report["extras"]["cli"] == {"missing": [], "fix": None}
    assert report["caches"]["graphs"] == {"folder": "/no/such/folder", "bytes": 0, "enabled": True}
    assert {name: report["environment"][name] for name in keys} == dict.fromkeys(keys, "(set, hidden)")

    lines = list(doctor.format_report(report))
    assert lines[0] == f"florence-onnx {__version__}"
    assert [line for line in lines if line and not line.startswith(" ")][1:] == [
        name.replace("_", "-") for name in SECTIONS
    ]
    assert any(line.startswith("  cpu             ok (CPUExecutionProvider, ") for line in lines)
    assert any(line == "  FAL_KEY         (set, hidden)" for line in lines)


@pytest.mark.parametrize("broken", [None, ModuleType("onnxruntime")], ids=["missing", "without its files"])
def test_a_broken_onnxruntime_is_reported_and_ends_with_1(
    broken: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", broken)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    report = json.loads(result.stdout)
    expected = "onnxruntime is not installed" if broken is None else "AttributeError: module 'onnxruntime' has no"
    assert report["onnxruntime"]["error"].startswith(expected)
    assert "pip install 'florence-onnx[cpu]'" in report["onnxruntime"]["fix"]
    assert all(device["reason"].startswith(expected) for device in report["devices"].values())
    assert report["self_test"]["error"].startswith(expected)
    assert report["packages"]["numpy"] and report["system"]["cores"] >= 1  # the rest of the report is there

    readable = CliRunner().invoke(app, ["doctor"])
    assert readable.exit_code == 1
    assert f"demo on device auto: does not work: {expected}" in readable.stdout


def test_a_section_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise PermissionError(13, "Permission denied", "/proc/cpuinfo")

    monkeypatch.setattr(doctor.cpu, "num_cores", fail)
    section = doctor.attempt(doctor._system)
    assert section == {"error": "PermissionError: [Errno 13] Permission denied: '/proc/cpuinfo'"}
    report = dict.fromkeys(SECTIONS, section) | {"florence_onnx": "0"}
    assert list(doctor.format_report(report)).count(f"  error: {section['error']}") == len(SECTIONS) - 1


def test_an_error_that_is_a_bug_is_not_hidden() -> None:
    with pytest.raises(TypeError):
        doctor.attempt(lambda: len(5))  # type: ignore[arg-type, return-value]


@needs_demo
def test_a_wrong_answer_of_the_demo_model_fails_the_self_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.loads((doctor.SAMPLES / "samples.json").read_text(encoding="utf-8"))[0]
    shutil.copy(doctor.SAMPLES / first["file"], tmp_path)
    wrong = {**first, "objects": [{**thing, "label": "green square"} for thing in first["objects"]]}
    (tmp_path / "samples.json").write_text(json.dumps([wrong]), encoding="utf-8")
    monkeypatch.setattr(doctor, "SAMPLES", tmp_path)
    section = doctor.self_test("cpu")
    assert not section["works"]
    assert section["reason"].startswith("wrong result: ") and section["reason"].endswith("green square")


# ---------------------------------------------------------------------------------------------------------- packages


def _install(folder: Path, name: str, number: str) -> None:
    """What pip leaves of a distribution, as far as importlib.metadata reads it."""
    info = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n", encoding="utf-8")


def test_several_distributions_of_onnxruntime_are_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing but what is made here
    assert doctor.installed_distributions() == {} and doctor.conflict({}) is None
    _install(tmp_path, "onnxruntime", "1.22.0")
    importlib.invalidate_caches()
    assert doctor.conflict(doctor.installed_distributions()) is None
    _install(tmp_path, "onnxruntime-gpu", "1.21.1")
    importlib.invalidate_caches()
    installed = doctor.installed_distributions()
    assert installed == {"onnxruntime": "1.22.0", "onnxruntime-gpu": "1.21.1"}
    assert doctor.conflict(installed) == (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; keep one, for example: "
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'florence-onnx[gpu]'"
    )


@pytest.mark.parametrize(
    ("extra", "installed", "command"),
    [
        ("gpu", [], "pip install 'florence-onnx[gpu]'"),
        ("cpu", ["onnxruntime"], "pip install 'florence-onnx[cpu]'"),
        ("openvino", ["onnxruntime"], "pip uninstall -y onnxruntime && pip install 'florence-onnx[openvino]'"),
        (
            "cpu",
            ["onnxruntime", "onnxruntime-openvino"],
            "pip uninstall -y onnxruntime onnxruntime-openvino && pip install 'florence-onnx[cpu]'",
        ),
    ],
)
def test_the_command_leaves_one_distribution(extra: str, installed: list[str], command: str) -> None:
    assert doctor.install_command(extra, dict.fromkeys(installed, "1")) == command


def test_extras_are_those_of_the_package_and_name_what_is_missing() -> None:
    requirements = metadata.requires("florence-onnx") or []
    for extra in doctor.EXTRAS:
        assert list(doctor._required(extra, requirements)), extra
    assert {"typer", "fastapi"} <= set(doctor._required("serve", requirements))  # [serve] includes [cli]
    made_up = ['florence-onnx[cli]; extra == "serve"', "no-such-package>=1 ; extra == 'cli'", "numpy; extra == 'serve'"]
    assert doctor.examine_extra("serve", made_up) == {
        "missing": ["no-such-package"],
        "fix": "pip install 'florence-onnx[serve]'",
    }


# ----------------------------------------------------------------------------------------------------------- devices


def _use_onnxruntime(monkeypatch: pytest.MonkeyPatch, *providers: str) -> None:
    module = ModuleType("onnxruntime")
    vars(module).update(get_available_providers=lambda: list(providers), cuda_version="12.8")
    monkeypatch.setattr(doctor, "onnxruntime", lambda: module)
    monkeypatch.setattr(doctor, "installed_distributions", lambda: {"onnxruntime": "1.22.0"})


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_gpu_needs_another_onnxruntime_only_where_there_is_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _use_onnxruntime(monkeypatch, "CPUExecutionProvider")
    monkeypatch.setattr(cuda, "find_gpu", lambda: None)
    without = doctor.examine_device(device)
    assert not without["works"] and without["fix"] is None
    assert "onnxruntime has no" in without["reason"] and "no NVIDIA GPU was found" in without["reason"]
    monkeypatch.setattr(cuda, "find_gpu", lambda: cuda.Gpu("NVIDIA H100", (9, 0), 80 * 2**30))
    with_gpu = doctor.examine_device(device)
    assert with_gpu["fix"] == "pip uninstall -y onnxruntime && pip install 'florence-onnx[gpu]'"
    assert "no NVIDIA GPU" not in with_gpu["reason"]


def test_a_provider_without_its_libraries_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: 0

    def load(name: str) -> Any:
        if name == cuda.DRIVER:
            return Driver()
        raise OSError(name)

    find = cuda.diagnose
    _use_onnxruntime(monkeypatch, "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
    monkeypatch.setattr(cuda, "diagnose", lambda version: find(version, load))
    section = doctor.examine_device("cuda")
    assert not section["works"]
    assert "libcudart.so.12" in section["reason"] and "no cuDNN 9" in section["reason"]
    assert section["fix"] == "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def test_tensorrt_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engines would take minutes."""
    _use_onnxruntime(monkeypatch, "TensorrtExecutionProvider")
    monkeypatch.setattr(cuda, "diagnose", lambda version: [])
    monkeypatch.setattr(cuda, "diagnose_tensorrt", lambda ort: [])
    section = doctor.examine_device("tensorrt")
    assert section["works"] and "build-engines" in section["note"]
    assert doctor._format_device(section).startswith("ok (not run")


# -------------------------------------------------------------------------------------------- caches and environment


def test_a_folder_is_measured_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "weights").write_bytes(bytes(1000))
    (tmp_path / "snapshots").mkdir()
    without_link = doctor.measure(tmp_path)
    assert without_link == {"folder": str(tmp_path), "bytes": 1000}
    (tmp_path / "snapshots" / "revision").symlink_to(tmp_path)  # a circle
    assert doctor.measure(tmp_path)["bytes"] < 1000 + len(str(tmp_path)) + 1
    assert doctor.measure(tmp_path / "none")["bytes"] == 0


def test_keys_and_passwords_are_hidden() -> None:
    given = {
        "FLORENCE_ONNX_API_KEY": "secret",
        "FAL_KEY_SECRET": "secret",
        "HF_TOKEN": "secret",
        "HF_ENDPOINT": "https://me:secret@hub.example/x",
        "FLORENCE_ONNX_MODEL": "demo",
        "HOME": "/home/me",
    }
    shown = doctor.environment(given)
    assert "secret" not in json.dumps(shown)
    assert shown["HF_ENDPOINT"] == "https://…@hub.example/x" and shown["FLORENCE_ONNX_MODEL"] == "demo"
    assert shown["HF_TOKEN"] == "(set, hidden)" and "HOME" not in shown
