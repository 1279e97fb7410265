"""Our fp32 graphs in OpenVINO's own Python API, with our generation loop.

We know no faster OpenVINO baseline. optimum-intel cannot export Florence-2; our graphs compute the cross KV once per
prompt and share it among the beams, which a plain export does not. The layout of transformers.js cannot be used:
OpenVINO's CPU plugin rejects its merged decoder ("doesn't support If operation with dynamic rank").
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.cpu.jobs import Job
from benchmarks.cpu.peers.ours import OnnxRunner
from florence_onnx import Florence2, loading
from florence_onnx.bundles import bundle

Array = npt.NDArray[Any]

_PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
"""OpenVINO's names of precisions to ours."""


class OpenVinoEngine:
    """`florence_onnx.runtime.engine.Engine` over a compiled OpenVINO model."""

    def __init__(self, path: Path, properties: Mapping[str, Any]) -> None:
        import openvino

        self._ov = openvino
        self._compiled = openvino.Core().compile_model(str(path), "CPU", dict(properties))
        self._request = self._compiled.create_infer_request()
        self.inputs: dict[str, np.dtype[Any]] = {
            port.any_name: np.dtype(port.element_type.to_dtype()) for port in self._compiled.inputs
        }
        self.outputs: list[str] = [port.any_name for port in self._compiled.outputs]
        self.num_runs = 0

    @property
    def precision(self) -> str:
        """The precision in which the device computes. OpenVINO silently ignores an unsupported hint."""
        return str(self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.num_runs += 1
        typed = {name: np.ascontiguousarray(value, dtype=self.inputs[name]) for name, value in feeds.items()}
        results = self._request.infer(typed, share_inputs=True)
        return dict(zip(self.outputs, results.values(), strict=True))

    def bind(self) -> OpenVinoBinding:
        return OpenVinoBinding(self, self._ov, self._compiled.create_infer_request())


class OpenVinoBinding:
    """Tensors over the caller's buffers; an output may share the buffer of an input."""

    def __init__(self, engine: OpenVinoEngine, openvino: Any, request: Any) -> None:
        self._engine = engine
        self._ov = openvino
        self._request = request

    def bind_input(self, name: str, array: Array) -> None:
        self._request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))

    def bind_output(self, name: str, array: Array) -> None:
        self._request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))

    def run(self) -> None:
        self._engine.num_runs += 1
        self._request.infer()


class OpenVinoRunner(OnnxRunner):
    """Our runtime with OpenVINO's engines."""

    def _load(self) -> Florence2:
        properties = {
            "INFERENCE_PRECISION_HINT": self._job.peer.options["hint"],
            "INFERENCE_NUM_THREADS": self._job.workload.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        read = bundle.read(Path(self._job.model))
        self._engines = [OpenVinoEngine(path, properties) for path in read.graphs.values()]
        vision_encoder, *text = self._engines
        return Florence2(read, vision_encoder, loading.text_backend(read, text), "OpenVINO", read.precision)

    def describe(self) -> dict[str, Any]:
        import openvino

        hint, found = self._job.peer.options["hint"], self._engines[0].precision
        ignored = f"this CPU computes in {found}: the {hint} hint has no effect"
        return {
            "versions": {"openvino": openvino.__version__.partition("-")[0]},
            "notes": [] if hint == found else [ignored],
            "precision": _PRECISIONS.get(found, self._job.peer.precision),
        }


def create(job: Job) -> OpenVinoRunner:
    """See `protocol.Factory`."""
    return OpenVinoRunner(job)
