"""`florence-onnx doctor`: what a bug report needs, and why something does not start.

Every section of the report is built by one function that returns JSON. A section that fails becomes its error message
and does not end the report: the installation that `doctor` examines may be broken at any place.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from florence_onnx._version import __version__
from florence_onnx.bundles import hub
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.demo import SAMPLES
from florence_onnx.errors import FlorenceError
from florence_onnx.model import Florence2
from florence_onnx.runtime import cpu, cuda, graph_cache, telemetry, tensorrt
from florence_onnx.runtime.providers import PRESETS
from florence_onnx.runtime.sessions import onnxruntime
from florence_onnx.tasks import OBJECT_DETECTION

Section = dict[str, Any]

PACKAGES = ("numpy", "Pillow", "tokenizers", "huggingface-hub")
DISTRIBUTIONS = {"onnxruntime": "cpu", "onnxruntime-gpu": "gpu", "onnxruntime-openvino": "openvino"}
"""Distributions that install the module `onnxruntime`, and the extra of this package that installs each."""
DEVICE_EXTRAS = {"cpu": "cpu", "cuda": "gpu", "tensorrt": "gpu", "openvino": "openvino"}
EXTRAS = ("cli", "serve", "fal", "mcp", "supervision", "export")
CPU_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8"),
    *cpu.BF16_FLAGS,
    *("asimddp", "i8mm", "bf16", "sve"),
)
"""Instruction sets for which ONNX Runtime and OpenVINO have kernels of their own: x86-64, then Arm."""
VARIABLES = (
    *(
        "FAL_KEY",
        "FAL_KEY_ID",
        "FAL_KEY_SECRET",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
        "HF_TOKEN",
    ),
    *("XDG_CACHE_HOME", telemetry.VARIABLE, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"),
)
"""Environment variables that are shown besides those that start with `FLORENCE_ONNX_`."""
_PREFIX = "FLORENCE_ONNX_"
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")
_COMMAND = re.compile(r"pip install '[^']+'")
_EXPECTED = (FlorenceError, ImportError, AttributeError, OSError, RuntimeError, ValueError, LookupError, MemoryError)
"""What a broken installation raises. AttributeError: two distributions that have overwritten each other's files."""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False) -> None:
    """Examine this installation, for bug reports.

    Shows versions, CPU and GPU, which devices work, extras, caches, environment variables (values of keys and tokens
    are hidden), and a self-test with the demo model. The exit code is 0 if the default device works, and 1 otherwise.
    """
    report = examine()
    typer.echo(json.dumps(report, indent=2, ensure_ascii=False) if as_json else "\n".join(format_report(report)))
    if not report["self_test"].get("works"):
        raise typer.Exit(1)


def examine() -> Section:
    """Builds the report. A section that cannot be determined is `{"error": message}`."""
    sections: dict[str, Callable[[], Section]] = {
        "system": _system,
        "packages": _packages,
        "onnxruntime": _onnxruntime,
        "devices": _devices,
        "extras": _extras,
        "caches": _caches,
        "environment": lambda: environment(os.environ),
        "self_test": lambda: self_test("auto"),
    }
    return {"florence_onnx": __version__, **{name: attempt(section) for name, section in sections.items()}}


def attempt(section: Callable[[], Section]) -> Section:
    """Calls a section; returns `{"error": message}` if it raises an error that a broken installation can cause."""
    try:
        return section()
    except _EXPECTED as error:
        return {"error": _describe(error)}


def _describe(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return message if isinstance(error, FlorenceError) and message else f"{type(error).__name__}: {message}"


# ------------------------------------------------------------------------------------------------------------ versions


def _system() -> Section:
    found = cpu.flags()
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu.name(),
        "cores": cpu.num_cores(),
        "flags": [flag for flag in CPU_FLAGS if flag in found],
        "gpu": _describe_gpu(),
    }


def _describe_gpu() -> str | None:
    found = cuda.find_gpu()
    if found is None:
        return None
    major, minor = found.compute_capability
    return f"{found.name}, sm_{major}{minor}, {found.memory / 2**30:.1f} GiB"


def _packages() -> Section:
    return {name: version(name) for name in PACKAGES}


def version(distribution: str) -> str | None:
    """Returns the version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def installed_distributions() -> dict[str, str]:
    """Returns the versions of the installed distributions of ONNX Runtime by name; there should be exactly one."""
    found = ((name, version(name)) for name in DISTRIBUTIONS)
    return {name: number for name, number in found if number is not None}


def install_command(extra: str, installed: Mapping[str, str]) -> str:
    """Returns the shell command that leaves the distribution of one extra as the only ONNX Runtime.

    Args:
        extra: `"cpu"`, `"gpu"` or `"openvino"`.
        installed: From `installed_distributions`.
    """
    install = f"pip install 'florence-onnx[{extra}]'"
    is_alone = [DISTRIBUTIONS[name] for name in installed] == [extra]
    # all go, also the wanted one: uninstalling a distribution removes files that the others have overwritten
    return install if is_alone or not installed else f"pip uninstall -y {' '.join(installed)} && {install}"


def _onnxruntime() -> Section:
    installed = installed_distributions()
    section: Section = {"distributions": installed, "warning": conflict(installed), "reports": telemetry.problem()}
    try:
        ort = onnxruntime()
        section |= {"version": str(ort.__version__), "providers": list(ort.get_available_providers())}
    except _EXPECTED as error:
        section |= {"error": _describe(error), "fix": install_command("cpu", installed)}
    return section


def conflict(installed: Mapping[str, str]) -> str | None:
    """Returns a warning if several distributions of ONNX Runtime are installed, else None."""
    if len(installed) < 2:
        return None
    extra = next(extra for extra in ("gpu", "openvino", "cpu") if extra in map(DISTRIBUTIONS.get, installed))
    return (
        f"{' and '.join(installed)} are both installed and overwrite each other's files; keep one, for example: "
        f"{install_command(extra, installed)}"
    )


# ------------------------------------------------------------------------------------------------------------- devices


def _devices() -> Section:
    return {device: attempt(partial(examine_device, device)) for device in DEVICE_EXTRAS}


def examine_device(device: str) -> Section:
    """Returns whether a device works, and if not why, and the command that fixes it.

    If no obstacle is found, the demo model is run, except with TensorRT, whose engines take minutes to build.

    Args:
        device: A key of `DEVICE_EXTRAS`.
    """
    reasons, fixes = find_obstacles(device)
    if reasons:
        return {"works": False, "reason": "; ".join(reasons), "fix": " && ".join(fixes) or None}
    if device == "tensorrt":
        return {"works": True, "note": "not run: `florence-onnx build-engines` builds the engines of a bundle"}
    return self_test(device)


def find_obstacles(device: str) -> tuple[list[str], list[str]]:
    """Returns why a device cannot run, as far as that shows without a session, and the commands that fix it."""
    installed = installed_distributions()
    fix = install_command(DEVICE_EXTRAS[device], installed)
    try:
        ort = onnxruntime()
        available = ort.get_available_providers()
    except _EXPECTED as error:
        return [_describe(error)], [fix]
    is_nvidia = device in ("cuda", "tensorrt")
    provider = PRESETS[device].provider
    if provider not in available:
        reasons = [f"the installed onnxruntime has no {provider}"]
        # another onnxruntime is of no use without a GPU
        if is_nvidia and cuda.find_gpu() is None:
            return [*reasons, "no NVIDIA GPU was found: `nvidia-smi` must list it (in Docker: --gpus all)"], []
        return reasons, [fix]
    return _nvidia_obstacles(device, ort) if is_nvidia else ([], [])


def _nvidia_obstacles(device: str, ort: ModuleType) -> tuple[list[str], list[str]]:
    cuda.preload(ort)
    reasons = cuda.diagnose(str(getattr(ort, "cuda_version", "")))
    if device == "tensorrt":
        reasons = [*reasons, *cuda.diagnose_tensorrt(ort)]
    return reasons, [command for reason in reasons for command in _COMMAND.findall(reason)[:1]]


def self_test(device: str) -> Section:
    """Runs object detection with the demo model on the first sample image, and compares the labels with the true ones.

    Args:
        device: As for `Florence2.from_pretrained`.

    Raises:
        FlorenceError: The model does not load or run on this device.
    """
    sample = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))[0]
    start = time.perf_counter()
    model = Florence2.from_pretrained(DEMO, device=device, graph_cache=False)
    found = sorted(box.label for box in model.run(OBJECT_DETECTION, SAMPLES / sample["file"]).results.bboxes)
    seconds = time.perf_counter() - start
    info = model.info()
    expected = sorted(thing["label"] for thing in sample["objects"])
    section = {"works": found == expected, "provider": info["provider"], "precision": info["precision"]}
    if found != expected:
        section["reason"] = f"wrong result: {', '.join(found) or 'nothing'} instead of {', '.join(expected)}"
    return {**section, "seconds": round(seconds, 2)}


# ------------------------------------------------------------------------------------------- extras, caches, variables


def _extras() -> Section:
    return {extra: examine_extra(extra, metadata.requires("florence-onnx") or []) for extra in EXTRAS}


def examine_extra(extra: str, requirements: list[str]) -> Section:
    """Returns which packages of an extra are missing, and the command that installs them.

    Args:
        extra: Name of the extra.
        requirements: All requirements of this package, as in its metadata: `rich>=13; extra == "cli"`.
    """
    missing = [name for name in _required(extra, requirements) if version(name) is None]
    return {"missing": missing, "fix": f"pip install 'florence-onnx[{extra}]'" if missing else None}


def _required(extra: str, requirements: list[str]) -> Iterator[str]:
    """Yields the distributions of an extra, including those of the extras that it includes."""
    for requirement in requirements:
        marked = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", requirement)
        match = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
        if marked is None or marked[1] != extra or match is None:
            continue
        if match[1] == "florence-onnx":
            for included in (match[2] or "").split(","):
                yield from _required(included, requirements)
        elif DISTRIBUTIONS.get(match[1]) is None or not installed_distributions():
            # any distribution of ONNX Runtime will do
            yield match[1]


def _caches() -> Section:
    chosen = graph_cache.folder(None)
    return {
        "graphs": {
            **attempt(lambda: measure(chosen or graph_cache.default_folder())),
            "enabled": chosen is not None,
        },
        "engines": attempt(lambda: measure(tensorrt.engine_folders(hub.resolve(DEMO))[-1])),
        "hub": attempt(lambda: measure(hub.default_cache())),
    }


def measure(folder: Path) -> Section:
    """Returns the path of a folder and its size in bytes, symbolic links not followed; 0 if it does not exist."""
    return {"folder": str(folder), "bytes": _num_bytes(folder) if folder.is_dir() else 0}


def _num_bytes(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(
            _num_bytes(Path(entry.path))
            if entry.is_dir(follow_symlinks=False)
            else entry.stat(follow_symlinks=False).st_size
            for entry in entries
        )


def environment(variables: Mapping[str, str]) -> Section:
    """Returns the variables that concern this package, with the values of keys and tokens hidden.

    Args:
        variables: The environment.
    """
    shown = {name: value for name, value in variables.items() if name.startswith(_PREFIX) or name in VARIABLES}
    return {name: "(set, hidden)" if _SECRET.search(name) else _without_password(shown[name]) for name in sorted(shown)}


def _without_password(value: str) -> str:
    return re.sub(r"//[^/@]*@", "//…@", value)


# ---------------------------------------------------------------------------------------------------------------- text


def format_report(report: Section) -> Iterator[str]:
    """Yields the lines of a report for people."""
    yield f"florence-onnx {report['florence_onnx']}"
    formats: dict[str, Callable[[Section], Iterator[str]]] = {
        "system": partial(_format_values, missing="none found"),
        "packages": partial(_format_values, missing="not installed"),
        "onnxruntime": _format_onnxruntime,
        "devices": lambda devices: _format_each(devices, _format_device),
        "extras": lambda extras: _format_each(extras, _format_extra),
        "caches": lambda caches: _format_each(caches, _format_cache),
        "environment": partial(_format_values, missing=""),
        "self_test": lambda result: iter([f"  demo on device auto: {_format_device(result)}"]),
    }
    for name, lines in formats.items():
        yield ""
        yield name.replace("_", "-")
        section = report[name]
        if set(section) == {"error"} and name != "self_test":
            yield f"  error: {section['error']}"
        else:
            yield from lines(section)


def _format_values(section: Section, missing: str) -> Iterator[str]:
    for name, value in section.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        yield f"  {name:15} {missing if shown is None else shown}"
    if not section:
        yield "  no variable of this package is set"


def _format_onnxruntime(section: Section) -> Iterator[str]:
    installed = ", ".join(f"{name} {number}" for name, number in section["distributions"].items())
    yield f"  {'distribution':15} {installed or 'none known to pip'}"
    for name in ("version", "providers", "warning", "reports", "error", "fix"):
        if section.get(name):
            value = section[name]
            yield f"  {name:15} {', '.join(value) if isinstance(value, list) else value}"


def _format_each(sections: Section, describe: Callable[[Section], str]) -> Iterator[str]:
    for name, section in sections.items():
        yield f"  {name:15} {describe(section)}"
        if section.get("fix"):
            yield f"  {'':15} fix: {section['fix']}"


def _format_device(section: Section) -> str:
    if not section.get("works"):
        return f"does not work: {section.get('reason') or section.get('error')}"
    if "note" in section:
        return f"ok ({section['note']})"
    return f"ok ({section['provider']}, {section['precision']}, {section['seconds']:.2f} s with loading)"


def _format_extra(section: Section) -> str:
    return f"missing: {', '.join(section['missing'])}" if section["missing"] else "installed"


def _format_cache(section: Section) -> str:
    if "error" in section:
        return f"error: {section['error']}"
    suffix = "" if section.get("enabled", True) else " (off: set FLORENCE_ONNX_GRAPH_CACHE=1 to use it)"
    return f"{section['folder']}, {section['bytes'] / 2**20:.1f} MiB{suffix}"
