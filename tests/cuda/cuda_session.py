"""What ONNX Runtime itself asks of CUDA: one JSON object, `python -m tests.cuda.cuda_session STEP`, under the stub.

Sessions are ONNX Runtime's own, without `florence_onnx.runtime.engine` between: this is what the engine relies on.
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
"""Sizes whose scores, 64 x 4 x 700 in fp16 and more, do not fit beside the weights in `RUN_LIMIT`."""
NO_WEIGHTS_LIMIT, RUN_LIMIT = 100_000, 3_000_000
NO_CAPTURE = -1
LOGITS = 1568
"""Columns of the demo's."""


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
            self.binding.bind_input(node.name, *self._place(node))
        for node in self.session.get_outputs():
            self.binding.bind_output(node.name, *self._place(node))

    def shape(self, node: Any) -> list[int]:
        """Sizes of an input or output."""
        return [self.sizes.get(size, size) for size in node.shape]

    def _place(self, node: Any) -> tuple[str, int, type, list[int], int]:
        """Where it is; a cache is updated in place."""
        name, shape, dtype = node.name.replace("present", "past_key_values"), self.shape(node), DTYPES[node.type]
        if name not in self.values:
            self.values[name] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0)
        return "cuda", 0, dtype, shape, self.values[name].data_ptr()

    def run(self, graph_id: int | None = None) -> None:
        """Runs once.

        Args:
            graph_id: `gpu_graph_id` of this run.
        """
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        if graph_id is not None:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        self.session.run_with_iobinding(self.binding, options)

    def run_on_the_host(self) -> None:
        """Runs once with inputs from the host, and outputs to it."""
        nodes = self.session.get_inputs()
        self.session.run(None, {node.name: np.zeros(self.shape(node), DTYPES[node.type]) for node in nodes})

    def asked(self, graph_id: int | None = None) -> dict[str, int]:
        """What CUDA was asked in one run."""
        counters = Counters()
        counters.reset()
        self.run(graph_id)
        return {**counters.asked(), "kernels": counters.num_kernels}


def values() -> Any:
    """A tensor there and back, and another's address as CUDA's runtime library knows it."""
    counters, library = Counters(), Counters().library
    sent = np.arange(1000, dtype=np.float32)
    counters.reset()
    value = onnxruntime.OrtValue.ortvalue_from_numpy(sent, "cuda", 0)
    asked = [counters.asked()]
    counters.reset()
    equal = bool((value.numpy() == sent).all())
    asked.append(counters.asked())
    kinds = {"OrtValue": _kind(library, value.data_ptr()), "numpy": _kind(library, sent.ctypes.data)}
    library.cudaHostRegister(ctypes.c_void_p(sent.ctypes.data), ctypes.c_size_t(sent.nbytes), 0)
    kinds["registered"] = _kind(library, sent.ctypes.data)
    status = [library.cudaHostUnregister(ctypes.c_void_p(sent.ctypes.data)) for _ in range(2)]
    kinds["unregistered"] = _kind(library, sent.ctypes.data)
    return {"equal": equal, "asked": asked, "kinds": kinds, "unregistering twice": status}


def _kind(library: Any, address: int) -> int:
    attributes = (ctypes.c_int * 64)()
    library.cudaPointerGetAttributes(attributes, ctypes.c_void_p(address))
    return attributes[0]


def card() -> Any:
    """The runtime library's own functions: memory within its limit, rows to other distances."""
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
    return [decoder.asked() for _ in range(3)][-1]


def host_buffers() -> Any:
    """Bytes by direction while an input on the host is bound, in the next run, and in one after it changed; then the same of an output."""
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
    place = "cpu", 0, np.float32, [2, 1, LOGITS], logits.ctypes.data
    note("bind output", lambda: decoder.binding.bind_output("logits", *place))
    note("run to the host", decoder.run)
    return found


def captured() -> Any:
    """Runs of one session by `gpu_graph_id`, one after another."""
    decoder = Decoder(SIZES, enable_cuda_graph=1)
    return [[graph_id, decoder.asked(graph_id)] for graph_id in (1, 1, 1, 2, 2, NO_CAPTURE, NO_CAPTURE, 1)]


def forbidden() -> Any:
    """What the stub says of memory that is taken, and of a copy that waits, within a capture."""
    counters, library = Counters(), Counters().library
    memory, graph, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(1)
    library.cudaStreamBeginCapture(stream, 0)
    library.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(64))
    library.cudaMemcpyAsync(memory, memory, ctypes.c_size_t(8), 3, stream)
    library.cudaMemcpy(memory, memory, ctypes.c_size_t(8), 3)
    library.cudaStreamEndCapture(stream, ctypes.byref(graph))
    library.cudaFree(memory)
    return counters[NOT_CAPTURABLE]


def limited() -> Any:
    """What ONNX Runtime raises where `gpu_mem_limit` is too small to open a session, and to run one."""
    return {
        "open": _raised(lambda: Decoder(SIZES, gpu_mem_limit=NO_WEIGHTS_LIMIT)),
        "bound": _raised(Decoder(MANY, gpu_mem_limit=RUN_LIMIT).run),
    }


def full() -> Any:
    """What it raises on a card that is full: for a tensor, and for runs between which memory becomes free again."""
    decoder = Decoder(SIZES)
    taken: list[Any] = []
    found = {"tensor": _raised(lambda: _fill(taken))}
    found["run"] = _raised(decoder.run_on_the_host)
    taken.clear()
    found["after"] = _raised(decoder.run)
    return found


def _fill(taken: list[Any]) -> None:
    while True:  # ends where the card is full
        taken.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type([2**16], np.uint8, "cuda", 0))


def _raised(step: Any) -> list[str]:
    """Class and text of what a step raises; empty if nothing."""
    native = onnxruntime.capi.onnxruntime_pybind11_state.Fail
    try:
        step()
    except (native, RuntimeError) as error:
        return [f"{type(error).__module__}.{type(error).__name__}", str(error)]
    return []


STEPS = {step.__name__: step for step in (values, card, plain, host_buffers, captured, forbidden, limited, full)}

if __name__ == "__main__":
    print(json.dumps(STEPS[sys.argv[1]]()))
