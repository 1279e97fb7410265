"""This runtime as a caller sees it: latencies of single requests and of batches, and throughput."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.gpu.figures import Figures
from benchmarks.gpu.hardware import Memory
from benchmarks.gpu.timing import Effort, device_time, timed
from export.verification.photograph import PHOTOGRAPH
from florence_onnx import Florence2, GenerationOptions, tasks
from florence_onnx.images import preprocessing

VARIANTS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "cpu-resident": {"device": "cpu", "max_batch": 32},
    "cuda": {"device": "cuda", "provider_options": {"enable_cuda_graph": 0}},
    "cuda-graphs": {"device": "cuda"},
    "cuda-host": {"device": "cuda", "max_batch": 0},
    "tensorrt": {"device": "tensorrt"},
}
"""Arguments of `from_pretrained`. `cuda-host` runs the same graphs, with all tensors passing through the host."""


@dataclass(frozen=True)
class Workload:
    """The sizes of the work."""

    batches: Sequence[int] = (1, 8, 32)
    """Batch sizes. The first must be 1: the peak memory of a single request is read after it."""
    caption_tokens: int = 16
    long_tokens: int = 128
    object_tokens: int = 64
    """Tokens of an object detection: about ten objects, each with a word or two and four location tokens."""
    num_beams: int = 3
    images: int = 64
    """Images of a throughput measurement."""


SMALL = Workload(batches=(1, 2), caption_tokens=5, long_tokens=6, object_tokens=6, images=2)


def forced(num_beams: int, num_tokens: int) -> GenerationOptions:
    """Returns options for exactly `num_tokens` tokens, the forced end token included.

    Greedy search has no drafts here: with random weights none would be accepted.
    """
    lookup = 0 if num_beams == 1 else None
    return GenerationOptions(
        num_beams=num_beams,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens - 1,
        prompt_lookup_num_tokens=lookup,
    )


class Caller:
    """A loaded model and its images."""

    def __init__(self, bundle: Path, variant: str, precision: str | None) -> None:
        arguments = {**VARIANTS[variant], "precision": precision}
        begin = time.perf_counter()
        self.model = Florence2.from_pretrained(bundle, **arguments)
        self.load_s = time.perf_counter() - begin
        info = self.model.info()
        self._size: tuple[int, int] = tuple(info["model"]["image_size"])
        self._pixels = {"mean": info["model"]["image_mean"], "std": info["model"]["image_std"]}
        with Image.open(PHOTOGRAPH) as opened:
            self._photograph = opened.convert("RGB")
        self.image = self._photograph.resize(self._size)

    def describe(self) -> dict[str, Any]:
        """Returns the part of `Florence2.info()` that describes the runtime."""
        info = self.model.info()
        return {name: value for name, value in info.items() if name not in ("path", "model", "source", "verification")}

    def preprocess(self) -> None:
        preprocessing.preprocess(self.image, size=self._size, **self._pixels)

    def encode(self) -> Any:
        return self.model.encode(self.image)

    def answers(self, images: Sequence[Any], num_beams: int, num_tokens: int, task: tasks.Task[Any]) -> int:
        """Runs a task on all images, and returns the number of tokens of the first answer."""
        found = self.model.run_batch(task, images, options=forced(num_beams, num_tokens))
        return len(found[0].token_ids) - 1

    def different_images(self, count: int) -> list[Image.Image]:
        """Returns images of the model's size, all different."""
        return [self.image.rotate(360 * index / count) for index in range(count)]

    def files(self, count: int) -> list[bytes]:
        """Returns different JPEG files, so that decoding and resizing are part of the work."""
        found = []
        for index in range(count):
            buffer = io.BytesIO()
            self._photograph.rotate(360 * index / count).resize((800, 600)).save(buffer, "JPEG", quality=90)
            found.append(buffer.getvalue())
        return found


def measure(
    bundle: Path,
    variant: str,
    workload: Workload,
    effort: Effort,
    figures: Figures,
    *,
    with_device: bool,
    precision: str | None = None,
) -> None:
    """Times one variant. `pytorch.measure` uses the same names of figures.

    Args:
        bundle: Directory of a bundle, in either layout.
        variant: A key of `VARIANTS`.
        workload: The sizes of the work.
        effort: Warm-ups and repeats of each figure.
        figures: Receives the figures.
        with_device: Whether to measure device time too, which needs a GPU.
        precision: Precision to load from the layout of transformers.js; fp32 by default.
    """
    with Memory() as memory:
        caller = Caller(bundle, variant, precision)
        figures.add("load_s", caller.load_s)
        figures.attempt("warm_up_s", lambda: timed(caller.model.warm_up, Effort(0, 1, 0))["ms"] / 1e3)
        _measure_single(caller, workload, effort, figures)
        figures.add("memory_b1", memory.peak())
        for batch in workload.batches[1:]:
            _measure_batch(caller, workload, batch, effort, figures)
        _measure_throughput(caller, workload, figures)
        figures.add("memory_all", memory.peak())
    figures.attempt("info", caller.describe)
    if with_device:  # last: the profiler takes memory, and slows down every launch
        _measure_device(caller, workload, figures)


def _measure_single(caller: Caller, workload: Workload, effort: Effort, figures: Figures) -> None:
    beams = workload.num_beams
    figures.attempt("preprocess", lambda: timed(caller.preprocess, effort))
    figures.attempt("encode_b1", lambda: timed(caller.encode, effort))
    figures.attempt("vision_b1", lambda: _difference(figures, "encode_b1", "preprocess"))
    _measure_steps(caller, workload, 1, effort, figures)
    whole = {
        "caption_b1": partial(caller.answers, [caller.image], beams, workload.caption_tokens, tasks.CAPTION),
        "caption_greedy_b1": partial(caller.answers, [caller.image], 1, workload.caption_tokens, tasks.CAPTION),
        "greedy128_b1": partial(caller.answers, [caller.image], 1, workload.long_tokens, tasks.CAPTION),
    }
    for name, call in whole.items():
        figures.attempt(name, partial(timed, call, effort))


def _measure_batch(caller: Caller, workload: Workload, batch: int, effort: Effort, figures: Figures) -> None:
    images = caller.different_images(batch)
    _measure_steps(caller, workload, batch, effort, figures)
    for name, beams in (("caption", workload.num_beams), ("caption_greedy", 1)):
        call = partial(caller.answers, images, beams, workload.caption_tokens, tasks.CAPTION)
        figures.attempt(f"{name}_b{batch}", partial(timed, call, effort))


def _measure_steps(caller: Caller, workload: Workload, batch: int, effort: Effort, figures: Figures) -> None:
    """Times decode steps: the difference between answers of two lengths, in which prefill cancels out."""
    encoded = [caller.model.encode(image) for image in caller.different_images(batch)]
    for search, beams in (("greedy", 1), ("beams", workload.num_beams)):
        short, long = (f"answer_{search}_{count}_b{batch}" for count in (2, workload.object_tokens))
        for name, tokens in ((short, 2), (long, workload.object_tokens)):
            call = partial(caller.answers, encoded, beams, tokens, tasks.CAPTION)
            figures.attempt(name, partial(timed, call, effort))
        figures.attempt(
            f"step_{search}_b{batch}", partial(_difference, figures, long, short, workload.object_tokens - 2)
        )


def _difference(figures: Figures, long: str, short: str, parts: int = 1) -> dict[str, float]:
    """Returns the difference of two figures, divided by a number of parts.

    Raises:
        RuntimeError: The difference is not positive, because other processes disturbed the measurement.
    """
    found = figures.found
    parted = {name: (found[long][name] - found[short][name]) / parts for name in ("ms", "min_ms")}
    if min(parted.values()) <= 0:
        raise RuntimeError(
            f"{long} took no longer than {short}: the machine is too busy, or the repeats are too few, to tell"
        )
    return parted


def _measure_throughput(caller: Caller, workload: Workload, figures: Figures) -> None:
    files = caller.files(workload.images)
    jobs: dict[str, tuple[int, int, tasks.Task[Any]]] = {
        "captions": (workload.num_beams, workload.caption_tokens, tasks.CAPTION),
        "captions_greedy": (1, workload.caption_tokens, tasks.CAPTION),
        "objects": (workload.num_beams, workload.object_tokens, tasks.OBJECT_DETECTION),
        "objects_greedy": (1, workload.object_tokens, tasks.OBJECT_DETECTION),
    }
    for name, (beams, tokens, task) in jobs.items():
        call = partial(caller.answers, files, beams, tokens, task)
        figures.attempt(f"throughput_{name}", partial(_rate, call, len(files)))


def _rate(call: Callable[[], object], count: int) -> dict[str, float]:
    found = timed(call, Effort(1, 2, 0))
    return {"per_s": count / found["min_ms"] * 1e3, "ms": found["ms"]}


def _measure_device(caller: Caller, workload: Workload, figures: Figures) -> None:
    figures.attempt("encode_b1_device", partial(device_time, caller.encode))
    encoded = [caller.encode()]
    for search, beams in (("greedy", 1), ("beams", workload.num_beams)):
        short, long = (f"answer_{search}_{count}_b1_device" for count in (2, workload.object_tokens))
        for name, tokens in ((short, 2), (long, workload.object_tokens)):
            call = partial(caller.answers, encoded, beams, tokens, tasks.CAPTION)
            figures.attempt(name, partial(device_time, call))
        figures.attempt(
            f"step_{search}_b1_device", partial(_device_step, figures, short, long, workload.object_tokens - 2)
        )
    images = caller.different_images(8)
    call = partial(caller.answers, images, 1, 2, tasks.CAPTION)
    figures.attempt("two_tokens_of_8_images_device", partial(device_time, call))


def _device_step(figures: Figures, short: str, long: str, steps: int) -> dict[str, float]:
    names = ("device_ms", "copies_ms", "kernels")
    return {name: (figures.found[long][name] - figures.found[short][name]) / steps for name in names}
