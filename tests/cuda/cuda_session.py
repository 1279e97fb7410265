"""Calls of ONNX Runtime itself to CUDA, as JSON: `python -m tests.cuda.cuda_session STEP`, under the stub.

The sessions are opened without `florence_onnx.runtime.engine`: these are the facts that the engine relies on.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np
import onnxruntime

from florence_onnx.bundles import bundle
from tests.cuda.cuda_stub import NOT_CAPTURABLE, Counters

CUDA = "CUDAExecutionProvider"
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
SIZES = {"prompts": 2, "length": 1, "capacity": 64, "encoder_length": 81}
MANY = {"prompts": 64, "length": 1, "capacity": 1024, "encoder_length": 700}
"""Sizes whose attention scores, 64 x 4 x 700 in fp16 and more, do not fit beside the weights in `RUN_LIMIT`."""
NO_WEIGHTS_LIMIT, RUN_LIMIT = 100_000, 3_000_000
NO_CAPTURE = -1
LOGITS = 1568
"""Vocabulary size of the demo."""


class Decoder:
    """A session of the demo's decoder with every buffer in device memory, bound by address."""

    def __init__(self, sizes: dict[str, int], **options: object) -> None:
        path = str(bundle.DEMO_DIRECTORY / bundle.DECODER)
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 4
        self.session: Any = onnxruntime.InferenceSession(path, quiet, providers=[(CUDA, options)], enable_fallback=0)
        self.sizes = sizes
        self.values: dict[str, Any] = {}
        self.binding = self.session.io_binding()
        for node in self.session.get_inputs():
            self.binding.bind_input(node.name, *self._location(node))
        for node in self.session.get_outputs():
            self.binding.bind_output(node.name, *self._location(node))

    def shape(self, node: Any) -> list[int]:
        """Shape of an input or output."""
        return [self.sizes.get(size, size) for size in node.shape]

    def _location(self, node: Any) -> tuple[str, int, type, list[int], int]:
        """The buffer of an input or output, as `io_binding` takes it; caches are updated in place."""
        name, shape, dtype = node.name.replace("present", "past_key_values"), self.shape(node), DTYPES[node.type]
        if name not in self.values:
            self.values[name] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0)
        return "cuda", 0, dtype, shape, self.values[name].data_ptr()

    def run(self, graph_id: int | None = None) -> None:
        """Runs the bound buffers once.

        Args:
            graph_id: `gpu_graph_id` of this run.
        """
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        if graph_id is not None:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        self.session.run_with_iobinding(self.binding, options)

    def run_on_the_host(self) -> None:
        """Runs once with inputs and outputs on the host."""
        nodes = self.session.get_inputs()
        self.session.run(None, {node.name: np.zeros(self.shape(node), DTYPES[node.type]) for node in nodes})

    def count(self, graph_id: int | None = None) -> dict[str, int]:
        """Counts the calls to CUDA of one run."""
        counters = Counters()
        counters.reset()
        self.run(graph_id)
        return {**counters.counts(), "kernels": counters.num_kernels}


def values() -> Any:
    """Copies of a tensor to the GPU and back, and kinds of memory as CUDA's runtime library tells them apart."""
    counters, library = Counters(), Counters().library
    sent = np.arange(1000, dtype=np.float32)
    counters.reset()
    value = onnxruntime.OrtValue.ortvalue_from_numpy(sent, "cuda", 0)
    counts = [counters.counts()]
    counters.reset()
    equal = bool((value.numpy() == sent).all())
    counts.append(counters.counts())
    kinds = {"OrtValue": _kind(library, value.data_ptr()), "numpy": _kind(library, sent.ctypes.data)}
    library.cudaHostRegister(ctypes.c_void_p(sent.ctypes.data), ctypes.c_size_t(sent.nbytes), 0)
    kinds["registered"] = _kind(library, sent.ctypes.data)
    status = [library.cudaHostUnregister(ctypes.c_void_p(sent.ctypes.data)) for _ in range(2)]
    kinds["unregistered"] = _kind(library, sent.ctypes.data)
    return {"equal": equal, "counts": counts, "kinds": kinds, "unregistering twice": status}


def _kind(library: Any, address: int) -> int:
    attributes = (ctypes.c_int * 64)()
    library.cudaPointerGetAttributes(attributes, ctypes.c_void_p(address))
    return attributes[0]


def memory() -> Any:
    """Functions of the stub's own runtime library: limited memory, and copies to rows of another pitch."""
    counters = Counters()
    library = counters.library
    pointer, size = ctypes.c_void_p(), ctypes.c_size_t
    library.cudaMalloc(ctypes.byref(pointer), size(600))
    found: dict[str, Any] = {"in use": counters.memory_in_use}
    found["over the limit"] = library.cudaMalloc(ctypes.byref(ctypes.c_void_p()), size(500))
    source, target = np.arange(6, dtype=np.uint8), np.full(600, 9, dtype=np.uint8)
    library.cudaMemcpy2D(pointer, size(4), ctypes.c_void_p(source.ctypes.data), size(2), size(2), size(3), 1)
    library.cudaMemcpy(ctypes.c_void_p(target.ctypes.data), pointer, size(600), 2)
    found["rows"] = target[:12].tolist()
    found["frees"] = [library.cudaFree(pointer), library.cudaFree(pointer)]
    found["in use after"] = counters.memory_in_use
    return found


def plain() -> Any:
    """The third run without CUDA graphs."""
    decoder = Decoder(SIZES)
    return [decoder.count() for _ in range(3)][-1]


def host_buffers() -> Any:
    """Bytes copied by direction: when a host input is bound, in a run, in a run after it changed; for a host output."""
    decoder, counters = Decoder(SIZES), Counters()
    ids, logits = np.zeros((2, 1), np.int64), np.zeros((2, 1, LOGITS), np.float32)
    found: dict[str, Any] = {}

    def note(name: str, step: Any) -> None:
        counters.reset()
        step()
        found[name] = [counters[f"bytes {direction}"] for direction in ("host to device", "device to host")]

    note("bind input", lambda: decoder.binding.bind_input("input_ids", "cpu", 0, np.int64, [2, 1], ids.ctypes.data))
    note("run", decoder.run)
    ids += 1
    note("run after a change", decoder.run)
    location = "cpu", 0, np.float32, [2, 1, LOGITS], logits.ctypes.data
    note("bind output", lambda: decoder.binding.bind_output("logits", *location))
    note("run to the host", decoder.run)
    return found


def captured() -> Any:
    """Consecutive runs of one session with different `gpu_graph_id`."""
    decoder = Decoder(SIZES, enable_cuda_graph=1)
    return [[graph_id, decoder.count(graph_id)] for graph_id in (1, 1, 1, 2, 2, NO_CAPTURE, NO_CAPTURE, 1)]


def forbidden() -> Any:
    """Calls that the stub counts as forbidden in a capture with an allocation and two copies, of which one waits."""
    counters, library = Counters(), Counters().library
    pointer, graph, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(1)
    library.cudaStreamBeginCapture(stream, 0)
    library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(64))
    library.cudaMemcpyAsync(pointer, pointer, ctypes.c_size_t(8), 3, stream)
    library.cudaMemcpy(pointer, pointer, ctypes.c_size_t(8), 3)
    library.cudaStreamEndCapture(stream, ctypes.byref(graph))
    library.cudaFree(pointer)
    return counters[NOT_CAPTURABLE]


def limited() -> Any:
    """Errors of ONNX Runtime where `gpu_mem_limit` is too small to open a session, and to run one."""
    return {
        "open": _raised(lambda: Decoder(SIZES, gpu_mem_limit=NO_WEIGHTS_LIMIT)),
        "bound": _raised(Decoder(MANY, gpu_mem_limit=RUN_LIMIT).run),
    }


def full() -> Any:
    """Its errors on a full GPU: for a tensor, for a run, and for another run after memory was freed."""
    decoder = Decoder(SIZES)
    tensors: list[Any] = []
    found = {"tensor": _raised(lambda: _fill(tensors))}
    found["run"] = _raised(decoder.run_on_the_host)
    tensors.clear()
    found["after"] = _raised(decoder.run)
    return found


def _fill(tensors: list[Any]) -> None:
    while True:  # until an error says that the GPU is full
        tensors.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type([2**16], np.uint8, "cuda", 0))


def _raised(step: Any) -> list[str]:
    """Class and text of the error that a step raises; empty if it raises none."""
    native = onnxruntime.capi.onnxruntime_pybind11_state.Fail
    try:
        step()
    except (native, RuntimeError) as error:
        return [f"{type(error).__module__}.{type(error).__name__}", str(error)]
    return []


STEPS = {step.__name__: step for step in (values, memory, plain, host_buffers, captured, forbidden, limited, full)}

if __name__ == "__main__":
    print(json.dumps(STEPS[sys.argv[1]]()))
