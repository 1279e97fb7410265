"""CUDA libraries that do nothing, so that ONNX Runtime's CUDA provider starts on a machine without a card.

    python -m tests.cuda_stub        # builds them and prints what to set

Under them a session is planned as on a card: which provider takes which node, where copies between host and device are
inserted, whether ONNX Runtime would capture a CUDA graph. Nothing is computed: a session must be created, never run.

The loader reads LD_LIBRARY_PATH when a process starts, so the session belongs in a child process with `environment()`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

DRIVER = "libcuda.so.1"
CUDNN = "libcudnn.so.9"
"""Opened by name since ONNX Runtime 1.28, before that linked."""
OURS = re.compile(r"lib(cuda|cudart|cudnn|cublas|cublasLt|cufft|curand|nvrtc)\.so\.\d+$")
TOOLS = ("cc", "nm", "readelf")

HEADER = """
#include <stdlib.h>
#include <string.h>
/* the first members of cudaDeviceProp, the same in CUDA 12 and 13 up to the version of the card */
struct properties {
    char name[256], ids[24];
    unsigned node_mask;
    size_t memory, shared_memory;
    int registers, warp;
    size_t pitch;
    int threads, block[3], grid[3];
    size_t constants;
    int major, minor;
};
"""
BODIES: tuple[tuple[str, str], ...] = (
    (r"__cudaRegisterFatBinary", "void **{}(void) {{ static void *handle; return &handle; }}"),
    (r"\w+Get(Error|Status|LastError)(String|Name)", 'const char *{}(void) {{ return "none: this is a stub"; }}'),
    (r"cudnnGet(Cudart)?Version", "size_t {}(void) {{ return 91000; }}"),
    (r"cudaGetDevice", "int {}(int *device) {{ *device = 0; return 0; }}"),
    (r"cudaGetDeviceCount|cuDeviceGetCount", "int {}(int *count) {{ *count = 1; return 0; }}"),
    (
        r"cudaGetDeviceProperties(_v2)?",
        "int {}(struct properties *card) {{ card->major = 9; card->minor = 0; card->warp = 32;"
        ' strcpy(card->name, "stub"); return 0; }}',
    ),
    # 75 and 76 are the two halves of the compute capability
    (
        r"cudaDeviceGetAttribute",
        "int {}(int *value, int which) {{ *value = which == 75 ? 9 : which == 76 ? 0 : 128; return 0; }}",
    ),
    (r"cudaMemGetInfo", "int {}(size_t *left, size_t *all) {{ *left = *all = (size_t)80 << 30; return 0; }}"),
    (r"\w+GetVersion", "int {}(int *version) {{ *version = 13000; return 0; }}"),
    (
        r"cuda(Malloc|HostAlloc|MallocHost)",
        "int {}(void **memory, size_t size) {{ *memory = calloc(1, size + 256); return 0; }}",
    ),
    # handles, streams, events
    (
        r"cu(blas|blasLt|dnn|daEvent|daStream)Create(WithFlags|WithPriority)?(_v2)?",
        "int {}(void **made) {{ *made = calloc(1, 4096); return 0; }}",
    ),
)
"""C functions by pattern of their name, the first that fits; every other function answers 0, which is success."""


def unavailable() -> str:
    """Why the stubs cannot be used here; empty where they can."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return (
            "the installed onnxruntime has no CUDAExecutionProvider: pip install '.[gpu]' in an environment of its own"
        )
    if not _provider().is_file():
        return "the CUDA provider of the installed onnxruntime is no ELF library: the stubs are for Linux"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"no {', '.join(missing)} on this machine to build do-nothing CUDA libraries with" if missing else ""


def build(cache: Path | None = None) -> Path:
    """The folder with the libraries; built once for an onnxruntime and a version of this file.

    Args:
        cache: Where folders are kept; by default with this package's other caches.
    """
    provider = _provider()
    status = provider.stat()
    key = f"{provider} {status.st_size} {status.st_mtime_ns} {Path(__file__).read_text()}"
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "florence_onnx" / "cuda_stub"
    folder = (cache or default) / hashlib.sha256(key.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        for library, functions in _functions(provider).items():
            _compile(made / library, functions)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that is to find the libraries of `folder` before any others."""
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def _provider() -> Path:
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"


def _functions(provider: Path) -> dict[str, set[str]]:
    """What the provider expects of each library."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "-d", str(provider)))
    functions: dict[str, set[str]] = {name: set() for name in (*needed, CUDNN) if OURS.match(name)}
    for line in _output("nm", "-D", "--undefined-only", str(provider)).splitlines():
        name, _, version = line.split()[-1].partition("@")
        library = version.strip("@") or (DRIVER if re.match(r"cu[A-Z]", name) else "")
        functions.get(library, set()).add(name)
    functions[DRIVER] |= {"cuInit", "cuDriverGetVersion", "cuDeviceGetCount"}  # what `florence_onnx.cuda` asks
    # what is opened by name is looked up by name: a string among the provider's data
    names = re.findall(rb"(?<=\0)cudnn[A-Z]\w+(?=\0)", provider.read_bytes())
    functions[CUDNN].update(name.decode() for name in names)
    return functions


def _compile(library: Path, functions: set[str]) -> None:
    source, versions = library.with_suffix(".c"), library.with_suffix(".map")
    source.write_text("\n".join([HEADER, *(_body(name) for name in sorted(functions))]))
    versions.write_text(
        f"{library.name} {{ global: *; }};\n"
    )  # the provider asks for symbols of a version by this name
    options = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    if library.name != DRIVER:
        options.append(f"-Wl,--version-script={versions}")
    _output("cc", *options, "-o", str(library), str(source))
    source.unlink()
    versions.unlink()


def _body(name: str) -> str:
    found = (body for pattern, body in BODIES if re.fullmatch(pattern, name))
    return next(found, "long {}(void) {{ return 0; }}").format(name)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout


def main() -> None:
    variables: Mapping[str, str] = environment(build())
    print(f"export LD_LIBRARY_PATH={variables['LD_LIBRARY_PATH']}")


if __name__ == "__main__":
    main()
