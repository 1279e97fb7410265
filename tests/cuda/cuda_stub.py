"""The CUDA stub: libraries that compute nothing, but let ONNX Runtime's CUDA provider start on a machine without a GPU.

    python -m tests.cuda.cuda_stub        # builds them and prints the variable to set

Sessions are planned as on a GPU: which provider takes which node, where copies between host and device are inserted,
and whether ONNX Runtime captures a CUDA graph. Sessions can also be run: device memory is host memory, copies are made,
kernels do nothing, so that outputs keep the content that their buffers had. All calls are counted, and the bytes of
copies by direction. Kernels of a CUDA graph are counted when it is captured; launching it does nothing.

The dynamic loader reads LD_LIBRARY_PATH when a process starts, so a session needs a child process with `environment()`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DRIVER = "libcuda.so.1"
CUDNN = "libcudnn.so.9"
"""ONNX Runtime opens it by name since 1.28, and was linked against it before."""
OURS = re.compile(r"lib(cuda|cudart|cudnn|cublas|cublasLt|cufft|curand|nvrtc)\.so\.\d+$")
RUNTIME = re.compile(r"libcudart\.so\.\d+$")
MEMORY = "FLORENCE_ONNX_STUB_MEMORY"
"""Environment variable: bytes of the stub's GPU, beyond which an allocation fails."""
TOOLS = ("cc", "nm", "readelf")
CALLED_BY_CTYPES = {
    *("cudaMalloc", "cudaFree", "cudaMemset", "cudaMemcpy", "cudaMemcpy2D", "cudaDeviceSynchronize", "cudaSetDevice"),
    *("cudaHostRegister", "cudaHostUnregister", "cudaGetErrorString", "cudaGetLastError", "cudaMemGetInfo"),
    "cudaPointerGetAttributes",
}
"""Functions of the runtime library that this package and its tests call; the provider may not import all of them."""
NOT_CAPTURABLE = "calls that no capture allows"
"""Counter of calls in a capture that fail on a GPU: allocations, copies that wait, waits for the whole device."""
KERNELS = re.compile(r"(__)?cu(da)?Launch\w*Kernel\w*|cu(blas|dnn)(?!\w*(Create|Destroy|Set|Get|Init|Finalize))\w+")
"""Functions that compute: kernel launches, and the functions of cuBLAS and cuDNN, which launch kernels themselves."""

HEADER = """
#include <stdlib.h>
#include <string.h>
long *stub_counter(const char *name);
#define ADD(counter, amount) __atomic_fetch_add(counter, amount, __ATOMIC_RELAXED)
#define NOTE(name) do { static long *calls; if (!calls) calls = stub_counter(name); ADD(calls, 1); } while (0)
size_t stub_memory(void);
/* the first members of cudaPointerAttributes; kinds: 0 memory that CUDA does not know, 1 pinned, 2 device memory */
struct attributes { int kind, device; const void *on_device, *on_host; };
/* the first members of cudaDeviceProp, the same in CUDA 12 and 13 up to the compute capability; between its alignments
   and the number of multiprocessors CUDA 12 has one member more; the last ones, various limits, only must not be 0 */
struct properties {
    char name[256], ids[24];
    unsigned node_mask;
    size_t memory, shared_memory;
    int registers, warp;
    size_t pitch;
    int threads, block[3], grid[3];
    size_t constants;
    int major, minor;
    size_t alignments[2];
    int multiprocessors[2], limits[80];
};
"""
RUNTIME_HEADER = """
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
enum { COUNTERS = 4096, BLOCKS = 65536, UNKNOWN = 0, HOST = 1, DEVICE = 2, INVALID_VALUE = 1, OUT_OF_MEMORY = 2 };
static struct { char name[80]; long count; } counters[COUNTERS];
static struct { char *start; size_t size; int kind, is_ours; } blocks[BLOCKS];
static size_t in_use;
static void *capturing;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

long *stub_counter(const char *name) {
    pthread_mutex_lock(&lock);
    int at = 0;
    while (counters[at].name[0] && strcmp(counters[at].name, name)) ++at;
    strncpy(counters[at].name, name, sizeof counters[at].name - 1);
    pthread_mutex_unlock(&lock);
    return &counters[at].count;
}
const char *stub_name(int at) { return counters[at].name; }
long stub_count(const char *name) { return *stub_counter(name); }
void stub_reset(void) { for (int at = 0; at < COUNTERS; ++at) counters[at].count = 0; }
static void not_while_capturing(void) { if (capturing) NOTE("calls that no capture allows"); }
/* a function without Async in its name waits for the device, or for a stream that waits for the captured one */
#define WAITS(name) do { if (!strstr(name, "Async")) not_while_capturing(); } while (0)

size_t stub_memory(void) {
    const char *said = getenv("FLORENCE_ONNX_STUB_MEMORY");
    return said ? strtoull(said, 0, 10) : (size_t)80 << 30;
}
static int kind_of(const void *pointer) {
    int kind = UNKNOWN;
    pthread_mutex_lock(&lock);
    for (int at = 0; at < BLOCKS && blocks[at].start && !kind; ++at)
        if ((char *)pointer >= blocks[at].start && (char *)pointer < blocks[at].start + blocks[at].size)
            kind = blocks[at].kind;
    pthread_mutex_unlock(&lock);
    return kind;
}
/* pages of zeros, which take no host memory until they are written to; or `registered`, memory that exists already */
static int take(void **memory, size_t size, int kind, void *registered) {
    not_while_capturing();
    pthread_mutex_lock(&lock);
    int at = 0;
    void *start = MAP_FAILED;
    while (at < BLOCKS && blocks[at].kind) ++at;
    if (at < BLOCKS && (kind == HOST || in_use + size <= stub_memory()))
        start = registered ? registered : mmap(0, size + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start != MAP_FAILED) {
        blocks[at].start = *memory = start;
        blocks[at].size = size;
        blocks[at].kind = kind;
        blocks[at].is_ours = !registered;
        if (kind == DEVICE) in_use += size;
    }
    pthread_mutex_unlock(&lock);
    return start == MAP_FAILED ? OUT_OF_MEMORY : 0;
}
static int give(void *memory) {
    not_while_capturing();
    pthread_mutex_lock(&lock);
    int at = 0, status = memory ? INVALID_VALUE : 0;
    while (at < BLOCKS && blocks[at].start && !(blocks[at].kind && blocks[at].start == memory)) ++at;
    if (memory && at < BLOCKS && blocks[at].start) {
        if (blocks[at].kind == DEVICE) in_use -= blocks[at].size;
        if (blocks[at].is_ours) munmap(memory, blocks[at].size + 1);
        blocks[at].size = blocks[at].kind = status = 0;
    }
    pthread_mutex_unlock(&lock);
    return status;
}
static void note_copy(const void *target, const void *source, size_t size) {
    static const char *names[] = {"bytes host to host", "bytes device to host", "bytes host to device", "bytes device to device"};
    ADD(stub_counter(names[2 * (kind_of(target) == DEVICE) + (kind_of(source) == DEVICE)]), size);
}
"""
BODIES: tuple[tuple[str, str], ...] = (
    (r"__cudaRegisterFatBinary", "void **{}(void) {{ static void *handle; return &handle; }}"),
    (
        r"\w+Get(Error|Status|LastError)(String|Name)",
        'const char *{}(int status) {{ return status == 2 ? "out of memory" : "none: this is a stub"; }}',
    ),
    (r"cudnnGet(Cudart)?Version", "size_t {}(void) {{ return 91000; }}"),
    (r"cudaGetDevice", "int {}(int *device) {{ *device = 0; return 0; }}"),
    (r"cudaGetDeviceCount|cuDeviceGetCount", "int {}(int *count) {{ *count = 1; return 0; }}"),
    (
        r"cudaGetDeviceProperties(_v2)?",
        "int {}(struct properties *gpu) {{ gpu->major = 9; gpu->minor = 0; gpu->warp = 32;"
        " gpu->memory = stub_memory(); gpu->shared_memory = 49152; gpu->registers = 65536; gpu->threads = 1024;"
        " for (int i = 0; i < 3; ++i) gpu->block[i] = gpu->grid[i] = 1024;"
        " gpu->multiprocessors[0] = gpu->multiprocessors[1] = 132;"
        " for (int i = 0; i < 80; ++i) gpu->limits[i] = 2048;"
        ' strcpy(gpu->name, "stub"); return 0; }}',
    ),
    (r"cuDeviceGetName", 'int {}(char *name, int size, int device) {{ strncpy(name, "stub", size); return 0; }}'),
    (r"cuDeviceTotalMem(_v2)?", "int {}(size_t *size, int device) {{ *size = stub_memory(); return 0; }}"),
    # 75 and 76 are the major and minor number of the compute capability
    (
        r"cu(da)?DeviceGetAttribute",
        "int {}(int *value, int which) {{ *value = which == 75 ? 9 : which == 76 ? 0 : 128; return 0; }}",
    ),
    (
        r"cudaMemGetInfo",
        "int {}(size_t *left, size_t *all) {{ *all = stub_memory(); *left = *all - in_use; return 0; }}",
    ),
    (r"\w+GetVersion", "int {}(int *version) {{ *version = 13000; return 0; }}"),
    (
        r"cudaMalloc(Async|FromPoolAsync)?",
        'int {0}(void **memory, size_t size) {{ NOTE("{0}"); return take(memory, size, DEVICE, 0); }}',
    ),
    (
        r"cuda(HostAlloc|MallocHost)",
        'int {0}(void **memory, size_t size) {{ NOTE("{0}"); return take(memory, size, HOST, 0); }}',
    ),
    (
        r"cudaHostRegister",
        'int {0}(void *memory, size_t size) {{ NOTE("{0}"); return take(&memory, size, HOST, memory); }}',
    ),
    (
        r"cuda(Free(Async|Host)?|HostUnregister)",
        'int {0}(void *memory) {{ NOTE("{0}"); return give(memory); }}',
    ),
    (
        r"cudaPointerGetAttributes",
        "int {}(struct attributes *found, const void *pointer) {{ found->kind = kind_of(pointer); found->device = 0;"
        " found->on_device = found->kind ? pointer : 0; found->on_host = found->kind == DEVICE ? 0 : pointer; return 0; }}",
    ),
    (
        r"cudaMemcpy(Async)?",
        'int {0}(void *target, const void *source, size_t size) {{ NOTE("{0}"); WAITS("{0}"); note_copy(target, source, size);'
        " memmove(target, source, size); return 0; }}",
    ),
    (
        r"cudaMemcpy2D(Async)?",
        "int {0}(char *target, size_t target_pitch, const char *source, size_t source_pitch, size_t width, size_t rows)"
        ' {{ NOTE("{0}"); WAITS("{0}"); note_copy(target, source, width * rows); for (size_t row = 0; row < rows; ++row)'
        " memmove(target + row * target_pitch, source + row * source_pitch, width); return 0; }}",
    ),
    (
        r"cudaMemset(Async)?",
        'int {0}(void *memory, int value, size_t size) {{ NOTE("{0}"); WAITS("{0}"); memset(memory, value, size); return 0; }}',
    ),
    (r"cudaDeviceSynchronize", 'int {0}(void) {{ NOTE("{0}"); WAITS("{0}"); return 0; }}'),
    (r"cudaStreamBeginCapture", 'int {0}(void *stream) {{ NOTE("{0}"); capturing = stream; return 0; }}'),
    (
        r"cudaStreamEndCapture",
        'int {0}(void *stream, void **graph) {{ NOTE("{0}"); capturing = 0; *graph = calloc(1, 64); return 0; }}',
    ),
    (
        r"cudaStreamIsCapturing",
        "int {}(void *stream, int *status) {{ *status = capturing && stream == capturing; return 0; }}",
    ),
    (
        r"cudaGraphInstantiate(WithFlags)?",
        'int {0}(void **made, void *graph) {{ NOTE("{0}"); *made = calloc(1, 64); return 0; }}',
    ),
    # handles, streams, events
    (
        r"cu(blas|blasLt|dnn|daEvent|daStream)Create(WithFlags|WithPriority)?(_v2)?",
        "int {}(void **made) {{ *made = calloc(1, 4096); return 0; }}",
    ),
)
"""C functions by a pattern of their names; the first match counts. All others are counted and return 0, success."""


def unavailable() -> str:
    """Why the stub cannot be used here; empty where it can."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return (
            "the installed onnxruntime has no CUDAExecutionProvider: pip install '.[gpu]' in an environment of its own"
        )
    if not _provider().is_file():
        return "the CUDA provider of the installed onnxruntime is not an ELF library: the stub is for Linux"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"no {', '.join(missing)} on this machine to build the CUDA stub with" if missing else ""


def build(cache: Path | None = None) -> Path:
    """Builds the libraries, once for each onnxruntime and version of this file.

    Args:
        cache: Parent folder of the libraries' folder; by default beside this package's other caches.

    Returns:
        The folder with the libraries.
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
        libraries = _functions(provider)
        runtime = next(name for name in libraries if RUNTIME.match(name))
        _compile(made / runtime, libraries.pop(runtime) | CALLED_BY_CTYPES)
        for library, functions in libraries.items():
            _compile(made / library, functions, runtime)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Environment variables of a process that finds the libraries of `folder` before any others."""
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def run(*arguments: str, memory: int | None = None) -> Any:
    """Runs Python in a process with the stub, and returns what it prints as JSON.

    Args:
        arguments: Of Python, such as `-m` and a module.
        memory: Bytes of the stub's GPU.
    """
    variables = environment(build())
    if memory is not None:
        variables[MEMORY] = str(memory)
    root = Path(__file__).parents[2]
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Counters:
    """The stub's counters, in a process that runs with it."""

    def __init__(self) -> None:
        import onnxruntime

        name = f"libcudart.so.{str(onnxruntime.cuda_version).partition('.')[0]}"
        self.library = ctypes.CDLL(name)
        self.library.stub_count.restype = ctypes.c_long
        self.library.stub_name.restype = ctypes.c_char_p

    def __getitem__(self, name: str) -> int:
        """Number of calls of a function, or of bytes such as `"bytes host to device"`."""
        return int(self.library.stub_count(name.encode()))

    def counts(self) -> dict[str, int]:
        """All counters that are not zero, by name."""
        names = (self.library.stub_name(at).decode() for at in itertools.count())
        found = {name: self[name] for name in itertools.takewhile(bool, names)}
        return {name: count for name, count in found.items() if count}

    @property
    def num_kernels(self) -> int:
        """Kernels that were launched one by one, within a capture or not."""
        return sum(count for name, count in self.counts().items() if KERNELS.fullmatch(name))

    @property
    def memory_in_use(self) -> int:
        """Bytes of device memory that are allocated."""
        left, size = ctypes.c_size_t(), ctypes.c_size_t()
        self.library.cudaMemGetInfo(ctypes.byref(left), ctypes.byref(size))
        return size.value - left.value

    def reset(self) -> None:
        """Sets all counters to zero."""
        self.library.stub_reset()


def _provider() -> Path:
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"


def _functions(provider: Path) -> dict[str, set[str]]:
    """Names of the functions that the provider needs, by library."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "-d", str(provider)))
    functions: dict[str, set[str]] = {name: set() for name in (*needed, CUDNN) if OURS.match(name)}
    for line in _output("nm", "-D", "--undefined-only", str(provider)).splitlines():
        name, _, version = line.split()[-1].partition("@")
        library = version.strip("@") or (DRIVER if re.match(r"cu[A-Z]", name) else "")
        functions.get(library, set()).add(name)
    # the functions that `florence_onnx.runtime.cuda` calls
    functions[DRIVER] |= {"cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName"}
    functions[DRIVER] |= {"cuDeviceGetAttribute", "cuDeviceTotalMem_v2"}
    # functions of a library that is opened by name are looked up by name: strings in the provider's data
    names = re.findall(rb"(?<=\0)cudnn[A-Z]\w+(?=\0)", provider.read_bytes())
    functions[CUDNN].update(name.decode() for name in names)
    return functions


def _compile(library: Path, functions: set[str], runtime: str = "") -> None:
    """Compiles a library.

    Args:
        library: Its path.
        functions: Names of its functions.
        runtime: File name of the runtime library, which has the counters; empty if this is it.
    """
    source, versions = library.with_suffix(".c"), library.with_suffix(".map")
    source.write_text(
        "\n".join([HEADER, "" if runtime else RUNTIME_HEADER, *(_body(name) for name in sorted(functions))])
    )
    versions.write_text(
        f"{library.name} {{ global: *; }};\n"
    )  # the provider asks for symbols of a version by this name
    options = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    if library.name != DRIVER:
        options.append(f"-Wl,--version-script={versions}")
    counting = [f"-L{library.parent}", f"-l:{runtime}"] if runtime else []
    _output("cc", *options, "-o", str(library), str(source), *counting)
    source.unlink()
    versions.unlink()


def _body(name: str) -> str:
    found = (body for pattern, body in BODIES if re.fullmatch(pattern, name))
    return next(found, 'long {0}(void) {{ NOTE("{0}"); return 0; }}').format(name)


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
