"""What the CUDA provider is asked while a model answers: one JSON object.

`python -m tests.cuda.cuda_running STEP [BUNDLE…]`, under the stub.

Kernels do nothing there, so answers mean nothing; how often memory is taken, what crosses between host and device, and what is captured
and replayed is what it would be on a card. cuDNN's convolutions do not get through the stub: features come from the host.
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


class Asked:
    """A model on the pretended card, and an image that was encoded elsewhere."""

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
        """The stages on the device."""
        return self.model._answering._resident  # type: ignore[attr-defined]

    @property
    def decoder(self) -> Any:
        """The decoder of `resident`."""
        return self.resident._batch._decoder

    def run(self, count: int = 1, beams: int = 3) -> dict[str, Any]:
        """What one call asked of CUDA, and how often the text graphs ran."""
        # no token is twice as likely as another where kernels do nothing: the end is kept away by force
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


def clear_best(asked: Asked) -> None:
    """Puts scores of which none equal another where the kernels, which do nothing, would put theirs."""
    for call in asked.decoder._calls.values():
        received = call._received
        received.on_host("top_values")[:] = -np.arange(32)
        received.on_host("top_ids")[:] = np.arange(100, 132)
        received.upload()


def steady() -> Any:
    """The first and the second call of one question, then once more with clear scores; the same for eight at a time."""
    asked = Asked()
    found: dict[str, Any] = {}
    for count in (1, 8):
        found[f"first of {count}"], found[f"equal scores, {count}"] = asked.run(count), asked.run(count)
        clear_best(asked)
        found[f"clear scores, {count}"] = asked.run(count)
    return found


def without_graphs() -> Any:
    """The third call where the caller wants no CUDA graphs."""
    asked = Asked(provider_options={"enable_cuda_graph": 0})
    return [asked.run() for _ in range(3)][-1]


def through_the_host() -> Any:
    """The third call where everything passes through the host."""
    asked = Asked(max_batch=0)
    return [asked.run() for _ in range(3)][-1]


def full() -> Any:
    """One question, many, and one again, on a card too small for many."""
    asked = Asked()
    return {"answers": [asked.run(count)["answers"] for count in (1, 16, 1)], "batch_size": asked.decoder.batch_size}


def too_small() -> Any:
    """The errors of a question where only the weights fit, and of loading where not even they do."""
    found = {}
    steps: dict[str, Callable[[], object]] = {
        "load": lambda: Asked(provider_options={"gpu_mem_limit": 1_000_000}),
        "run": lambda: Asked().run(),
    }
    for name, step in steps.items():
        try:
            step()
        except FlorenceError as error:
            found[name] = [type(error).__name__, str(error)]
    return found


def memory() -> Any:
    """Bytes of the card in use after so many prompts with three beams, and what was reckoned with."""
    found = {}
    for count in (1, 8, 32):
        asked = Asked(max_batch=count)
        asked.run(count)
        bundle = asked.model._bundle
        need = estimate(bundle, count, 3, capacity=asked.decoder.capacity)
        assert need is not None
        before = asked.counters.memory_in_use
        # what the vision encoder, whose convolutions do not get through the stub, would take besides
        images = min(count, MAX_IMAGES)
        vision = bundle.memory[IMAGE] * images + 4 * images * 3 * bundle.sizes.image_size[0] ** 2
        found[str(count)] = [before, need.total - CONTEXT_BYTES - vision]
        del asked
        gc.collect()
    return found


def kernels(*bundles: str) -> Any:
    """Kernels of the text encoder for a prompt, and of a decoder step of three beams, by bundle; the opening step included."""
    found = {}
    for bundle in bundles or ("demo",):
        asked = Asked(bundle, provider_options={"enable_cuda_graph": 0})
        calls = [asked.run() for _ in range(2)][-1]
        asked.counters.reset()
        asked.decoder._encoding(0).run()
        text = asked.counters.num_kernels
        found[bundle] = {"text encoder": text, "step": (calls["kernels"] - text) / calls["steps"]}
    return found


STEPS = {step.__name__: step for step in (steady, without_graphs, through_the_host, full, too_small, memory, kernels)}

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    print(json.dumps(STEPS[sys.argv[1]](*sys.argv[2:])))
