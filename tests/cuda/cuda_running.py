"""Calls to CUDA while a model runs, as JSON: `python -m tests.cuda.cuda_running STEP [BUNDLE…]`, under the stub.

Kernels do nothing there, so answers mean nothing. Allocations, copies between host and device, and captured and
replayed graphs are the same as on a GPU. cuDNN's convolutions cannot run under the stub, so image features come from
the host.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from florence_onnx import Florence2, GenerationOptions
from florence_onnx.bundles.memory import CONTEXT_BYTES, IMAGE, MAX_IMAGES, estimate
from florence_onnx.errors import FlorenceError
from florence_onnx.prediction import EncodedImage
from tests.cuda.cuda_stub import NOT_CAPTURABLE, Counters

COUNTED = (
    *("cudaMalloc", "cudaMemcpy", "cudaMemcpyAsync", "cudaMemcpy2D", NOT_CAPTURABLE),
    *("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphLaunch"),
    *("bytes host to device", "bytes device to host", "bytes device to device"),
)
NUM_TOKENS = 12


class Harness:
    """A model on the stub's GPU, and an encoded image of zeros."""

    def __init__(self, bundle: str = "demo", **arguments: Any) -> None:
        self.model = Florence2.from_pretrained(bundle, device="cuda", **arguments)
        sizes = self.model._bundle.sizes
        features: Any = np.zeros((sizes.num_image_tokens, sizes.width), dtype=np.float32)
        if arguments.get("max_batch") != 0:
            features = self.resident.upload(features)
        self.encoded = EncodedImage(features, Image.new("RGB", (64, 64)))
        self.counters = Counters()

    @property
    def resident(self) -> Any:
        """The `ResidentModel`."""
        return self.model._answering._resident  # type: ignore[attr-defined]

    @property
    def decoder(self) -> Any:
        """The `ResidentDecoder`."""
        return self.resident._batch._decoder

    def run(self, count: int = 1, beams: int = 3) -> dict[str, Any]:
        """Answers some prompts in one call, and counts the calls to CUDA and the runs of the text graphs."""
        # Under the stub all tokens may be equally likely: `min_new_tokens` forbids the end token until the last step.
        options = GenerationOptions(beams, NUM_TOKENS, min_new_tokens=NUM_TOKENS - 1, no_repeat_ngram_size=0)
        text = self.model._text_model
        engines = text._text_encoder, text._decoder  # type: ignore[attr-defined]
        before = [engine.num_runs for engine in engines]
        self.counters.reset()
        answers = self.model.run_batch("<OD>", [self.encoded] * count, options=options)
        found: dict[str, Any] = {name: self.counters[name] for name in COUNTED}
        found["kernels"] = self.counters.num_kernels
        found["prompts"], found["steps"] = (
            engine.num_runs - runs for engine, runs in zip(engines, before, strict=True)
        )
        found["answers"] = len(answers)
        return found


def write_distinct_scores(harness: Harness) -> None:
    """Fills the device's top-k buffers, which the kernels leave alone, with scores that all differ."""
    for call in harness.decoder._calls.values():
        received = call._received
        received.on_host("top_values")[:] = -np.arange(32)
        received.on_host("top_ids")[:] = np.arange(100, 132)
        received.upload()


def steady() -> Any:
    """Three calls with one prompt, the first two with equal and the third with distinct scores; the same with eight."""
    harness = Harness()
    found: dict[str, Any] = {}
    for count in (1, 8):
        found[f"first of {count}"], found[f"equal scores, {count}"] = harness.run(count), harness.run(count)
        write_distinct_scores(harness)
        found[f"distinct scores, {count}"] = harness.run(count)
    return found


def without_graphs() -> Any:
    """The third call where the caller has disabled CUDA graphs."""
    harness = Harness(provider_options={"enable_cuda_graph": 0})
    return [harness.run() for _ in range(3)][-1]


def through_the_host() -> Any:
    """The third call through the host (`HostAnswering`)."""
    harness = Harness(max_batch=0)
    return [harness.run() for _ in range(3)][-1]


def full() -> Any:
    """One prompt, then 16, then one again, on a GPU that may be too small for 16; the batch size at the end."""
    harness = Harness()
    answers = [harness.run(count)["answers"] for count in (1, 16, 1)]
    return {"answers": answers, "batch_size": harness.decoder.batch_size}


def too_small() -> Any:
    """The errors of a call where only the weights fit, and of loading where not even these do."""
    found = {}
    steps: dict[str, Callable[[], object]] = {
        "load": lambda: Harness(provider_options={"gpu_mem_limit": 1_000_000}),
        "run": lambda: Harness().run(),
    }
    for name, step in steps.items():
        try:
            step()
        except FlorenceError as error:
            found[name] = [type(error).__name__, str(error)]
    return found


def memory() -> Any:
    """Device memory in use after 1, 8 and 32 prompts with three beams, and the estimate of it, both in bytes."""
    found = {}
    for count in (1, 8, 32):
        harness = Harness(max_batch=count)
        harness.run(count)
        bundle = harness.model._bundle
        need = estimate(bundle, count, 3, capacity=harness.decoder.capacity)
        assert need is not None
        in_use = harness.counters.memory_in_use
        # without the vision encoder, which cannot run under the stub
        images = min(count, MAX_IMAGES)
        vision = bundle.memory[IMAGE] * images + 4 * images * 3 * bundle.sizes.image_size[0] ** 2
        found[str(count)] = [in_use, need.total - CONTEXT_BYTES - vision]
        del harness
        gc.collect()
    return found


def kernels(*bundles: str) -> Any:
    """Kernels of the text encoder for one prompt, and of a decode step with three beams on average, by bundle."""
    found = {}
    for bundle in bundles or ("demo",):
        harness = Harness(bundle, provider_options={"enable_cuda_graph": 0})
        calls = [harness.run() for _ in range(2)][-1]
        harness.counters.reset()
        harness.decoder._encoding(0, harness.encoded.num_image_tokens).run()
        text = harness.counters.num_kernels
        found[bundle] = {"text encoder": text, "step": (calls["kernels"] - text) / calls["steps"]}
    return found


STEPS = {step.__name__: step for step in (steady, without_graphs, through_the_host, full, too_small, memory, kernels)}

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    print(json.dumps(STEPS[sys.argv[1]](*sys.argv[2:])))
