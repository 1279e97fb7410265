"""The steps, most valuable first, and the function that runs each kind of step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.costs import Costs
from benchmarks.gpu import answers, graphs, hardware, ours, pytorch
from benchmarks.gpu.figures import Figures
from benchmarks.gpu.ours import Workload
from benchmarks.gpu.sources import DEMO, PLAIN, MissingError, Sources
from benchmarks.gpu.timing import QUICK, Effort, timed
from florence_onnx.bundles import bundle as bundles

RIVALS_EFFORT = Effort(warm_ups=2, at_least=3, seconds=0.0)
"""Fewer repeats for the rivals, whose calls take half a second each; device time is limited."""


@dataclass(frozen=True)
class Step:
    """A measurement that runs in a process of its own."""

    name: str
    kind: str
    """A key of `RUNNERS`."""
    size: str = ""
    """`demo`, `base` or `large`."""
    variant: str = ""
    timeout_s: float = 240.0


@dataclass(frozen=True)
class Settings:
    """Settings of all steps; sent to their processes as JSON."""

    device: str
    carried: str
    work: str
    is_quick: bool = False
    """Whether to measure each figure once, with tiny batches: a smoke test."""
    num_images: int = 3
    """Sample images whose answers are compared."""
    batches: Sequence[int] = field(default_factory=lambda: (1, 8, 32))

    @property
    def sources(self) -> Sources:
        return Sources(Path(self.carried), Path(self.work))

    @property
    def effort(self) -> Effort:
        return QUICK if self.is_quick else Effort()

    @property
    def workload(self) -> Workload:
        return ours.SMALL if self.is_quick else Workload(batches=tuple(self.batches))

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def plan(device: str, sizes: Sequence[str]) -> list[Step]:
    """Returns all steps for a device.

    Args:
        device: `cpu` or `cuda`.
        sizes: Sizes of the models that are timed, most important first.
    """
    steps = [Step("hardware", "hardware"), Step("rates", "rates"), Step("start", "start"), Step("answers", "answers")]
    is_cpu = device == "cpu"
    own = ("cpu", "cpu-resident") if is_cpu else ("cuda-graphs", "cuda")
    more = () if is_cpu else ("tensorrt", "cuda-host")
    for size in sizes:
        steps.append(Step(f"floors:{size}", "floors", size))
        steps += [Step(f"ours:{size}:{variant}", "ours", size, variant) for variant in own]
        steps.append(Step(f"transformers:{size}:fp16", "transformers", size, "fp16"))
        steps.append(Step(f"graphs:{size}", "graphs", size))
        steps.append(Step(f"transformers:{size}:compile", "transformers", size, "compile", timeout_s=360.0))
        steps.append(Step(f"check:{size}", "check", size))
        steps.append(Step(f"plain:{size}", "plain", size))
        steps += [Step(f"ours:{size}:{variant}", "ours", size, variant, 360.0) for variant in more]
        steps.append(Step(f"transformers:{size}:bf16", "transformers", size, "bf16"))
    return steps


def _hardware(step: Step, settings: Settings, figures: Figures) -> None:
    for name, value in hardware.describe().items():
        figures.add(name, value)


def _rates(step: Step, settings: Settings, figures: Figures) -> None:
    is_small = settings.is_quick or settings.device == "cpu"
    sizes = {"copy_bytes": 2**26, "size": 256} if is_small else {}
    figures.attempt("rates", lambda: hardware.measure_rates(settings.device, settings.effort, **sizes))


def _start(step: Step, settings: Settings, figures: Figures) -> None:
    """Tests whether a session starts as a user would start it: this process has no library path of ours."""
    from florence_onnx import Florence2

    model = Florence2.from_pretrained(DEMO, device=settings.device)
    figures.add("provider", model.info()["provider"])
    figures.attempt("warm_up", lambda: timed(model.warm_up, QUICK))


def _answers(step: Step, settings: Settings, figures: Figures) -> None:
    asked = answers.questions(1)[::5] if settings.is_quick else answers.questions(settings.num_images)
    answers.compare_demo(settings.device, settings.sources, asked, figures)


def _check(step: Step, settings: Settings, figures: Figures) -> None:
    bundle = settings.sources.bundle(step.size, "fp16")
    answers.compare_full_size(bundle, settings.device, 6 if settings.is_quick else 10, figures)


def _floors(step: Step, settings: Settings, figures: Figures) -> None:
    figures.add("costs", hardware.costs(Costs.read(settings.sources.checkpoint(step.size))))


def _ours(step: Step, settings: Settings, figures: Figures) -> None:
    if step.variant == "tensorrt" and not hardware.find_tensorrt():
        raise MissingError("TensorRT 10 is not on this machine: libnvinfer.so.10 does not load")
    bundle = settings.sources.bundle(step.size, "fp16")
    has_gpu = settings.device != "cpu"
    ours.measure(bundle, step.variant, settings.workload, settings.effort, figures, with_device=has_gpu)


def _plain(step: Step, settings: Settings, figures: Figures) -> None:
    """Times the layout of transformers.js on the same provider, with host arrays between the graphs."""
    bundle = settings.sources.bundle(step.size, PLAIN)
    variant = "cpu" if settings.device == "cpu" else "cuda"
    workload = Workload(batches=settings.workload.batches[:2], **_lengths(settings.workload))
    ours.measure(bundle, variant, workload, settings.effort, figures, with_device=False, precision="fp16")


def _lengths(workload: Workload) -> dict[str, int]:
    names = ("caption_tokens", "long_tokens", "object_tokens", "num_beams", "images")
    return {name: getattr(workload, name) for name in names}


def _graphs(step: Step, settings: Settings, figures: Figures) -> None:
    bundle = settings.sources.bundle(step.size, "fp16")
    variants = ["cpu"]
    if settings.device != "cpu":
        has_tensorrt = bool(hardware.find_tensorrt())
        variants = [name for name in graphs.VARIANTS if name != "cpu" and (name != "tensorrt" or has_tensorrt)]
    sizes = bundles.read(bundle).sizes
    batches = settings.workload.batches[:2] if settings.is_quick else settings.batches
    graphs.measure(bundle, sizes.num_image_tokens, settings.device, variants, batches, settings.effort, figures)


def _transformers(step: Step, settings: Settings, figures: Figures) -> None:
    sources, workload = settings.sources, settings.workload
    if step.variant == "compile" or settings.is_quick:  # every batch size and length is compiled anew
        workload = Workload(batches=(1,), **_lengths(workload))
    pytorch.measure(
        sources.checkpoint(step.size),
        sources.bundle(step.size, "fp16"),
        step.variant,
        settings.device,
        workload,
        QUICK if settings.is_quick else RIVALS_EFFORT,
        figures,
    )


RUNNERS = {
    "hardware": _hardware,
    "rates": _rates,
    "start": _start,
    "answers": _answers,
    "floors": _floors,
    "check": _check,
    "ours": _ours,
    "plain": _plain,
    "graphs": _graphs,
    "transformers": _transformers,
}
"""The functions that run the steps, by `Step.kind`."""
