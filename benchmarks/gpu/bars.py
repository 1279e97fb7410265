"""The targets (bars) of the GPU path: one H100, Florence-2-large, fp16, one image of 768 x 768."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Steps = Mapping[str, Mapping[str, Any]]
"""Outcomes by the step's name, with `status` and `figures`."""
BEST = ("cuda-graphs", "tensorrt", "cuda", "cpu-resident", "cpu")
"""Our variants; the first is what a user gets."""
EXACT_LOGITS = 1e-3
"""Bound on the relative error of logits in fp32. A single product in tf32 has an error of about 3e-4."""
FULL_SIZE_LOGITS = 0.05
"""The same in fp16, against the CPU provider, which computes much of an fp16 graph in fp32."""


@dataclass(frozen=True)
class Bar:
    """A target: a figure and its limit."""

    text: str
    limit: float
    unit: str
    kind: Literal["at most", "at least"]
    find: Callable[[Steps, str], float | None]
    """Returns the figure for a size of the model."""


@dataclass(frozen=True)
class Judged:
    """A bar and the figure that was measured."""

    bar: Bar
    value: float | None
    variant: str = ""

    @property
    def status(self) -> str:
        if self.value is None:
            return "not measured"
        is_met = self.value <= self.bar.limit if self.bar.kind == "at most" else self.value >= self.bar.limit
        return "met" if is_met else "missed"


def figure(steps: Steps, step: str, name: str, field: str = "ms") -> float | None:
    """Returns a figure of a step, or None if it is missing."""
    found = steps.get(step, {}).get("figures", {}).get(name)
    value = found.get(field) if isinstance(found, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def own_variant(steps: Steps, size: str) -> str:
    """Returns the variant of ours that is judged, the one with the fastest caption; empty if none was measured."""
    times = {name: figure(steps, f"ours:{size}:{name}", "caption_b1") for name in BEST}
    measured = {name: value for name, value in times.items() if value is not None}
    return min(measured, key=lambda name: measured[name]) if measured else ""


def _ours(name: str, field: str = "ms") -> Callable[[Steps, str], float | None]:
    return lambda steps, size: figure(steps, f"ours:{size}:{own_variant(steps, size)}", name, field)


def _graph(prefix: str, suffix: str, field: str = "ms") -> Callable[[Steps, str], float | None]:
    """Finds the best figure of a single graph over its variants."""

    def find(steps: Steps, size: str) -> float | None:
        names = steps.get(f"graphs:{size}", {}).get("figures", {})
        chosen = [name for name in names if name.startswith(prefix) and name.endswith(suffix)]
        values = [figure(steps, f"graphs:{size}", name, field) for name in chosen]
        return min((value for value in values if value is not None), default=None)

    return find


def _times(name: str, rival: str, size_of: str = "ms") -> Callable[[Steps, str], float | None]:
    def find(steps: Steps, size: str) -> float | None:
        own, other = _ours(name, size_of)(steps, size), figure(steps, f"transformers:{size}:{rival}", name, size_of)
        return other / own if own and other else None

    return find


def _memory(steps: Steps, size: str) -> float | None:
    megabytes = _ours("memory_b1", "peak_mb")(steps, size)
    return megabytes / 1000 if megabytes is not None else None


BARS: tuple[Bar, ...] = (
    Bar("vision, wall", 6, "ms", "at most", _ours("vision_b1")),
    Bar("vision, device", 6, "ms", "at most", _ours("encode_b1_device", "device_ms")),
    Bar("text encoder, wall (graph)", 1.5, "ms", "at most", _graph("text_encoder", "prompts 1")),
    Bar("text encoder, device", 1.5, "ms", "at most", _graph("text_encoder", "prompts 1 device", "device_ms")),
    Bar("decode step greedy, wall", 1.0, "ms", "at most", _ours("step_greedy_b1")),
    Bar("decode step greedy, device", 1.0, "ms", "at most", _ours("step_greedy_b1_device", "device_ms")),
    Bar("decode step 3 beams, wall", 1.3, "ms", "at most", _ours("step_beams_b1")),
    Bar("decode step 3 beams, device", 1.3, "ms", "at most", _ours("step_beams_b1_device", "device_ms")),
    Bar("caption, 16 tokens, 3 beams, wall", 30, "ms", "at most", _ours("caption_b1")),
    Bar("128 greedy tokens, wall", 130, "ms", "at most", _ours("greedy128_b1")),
    Bar("caption, times as fast as transformers fp16", 10, "x", "at least", _times("caption_b1", "fp16")),
    Bar("128 tokens, times as fast as transformers fp16", 10, "x", "at least", _times("greedy128_b1", "fp16")),
    Bar("caption, times as fast as its compiled static cache", 2, "x", "at least", _times("caption_b1", "compile")),
    Bar(
        "128 tokens, times as fast as its compiled static cache", 2, "x", "at least", _times("greedy128_b1", "compile")
    ),
    Bar("captions a second, throughput", 150, "/s", "at least", _ours("throughput_captions", "per_s")),
    Bar("object detections a second, throughput", 40, "/s", "at least", _ours("throughput_objects", "per_s")),
    Bar("peak device memory, batch 1, 3 beams", 3, "GB", "at most", _memory),
)


def judge(steps: Steps, size: str) -> list[Judged]:
    """Judges every bar for a size of the model. The bars were set for `large`."""
    variant = own_variant(steps, size)
    return [Judged(bar, bar.find(steps, size), variant) for bar in BARS]


def judge_answers(steps: Steps) -> list[tuple[str, str]]:
    """Judges the answers: fp32 must be exact, or its logits within `EXACT_LOGITS`; fp16 has no bound."""
    found: list[tuple[str, str]] = []
    for name, value in steps.get("answers", {}).get("figures", {}).items():
        if " against " not in name:
            continue
        shares: Sequence[float] = [value[search]["answers"] for search in ("greedy", "beams")]
        error = value["logits"]["relative"]
        said = f"equal answers {shares[0]:.1%} greedy, {shares[1]:.1%} beams; logits {error:.1e}"
        if "fp32" in name.partition(" against ")[0] and "as it comes" not in name:
            is_right = min(shares) == 1 or error < EXACT_LOGITS
            said += "; met" if is_right else "; MISSED"
        found.append((name, said))
    return found


def judge_checks(steps: Steps) -> list[tuple[str, str]]:
    """Judges full-size models: logits must be finite, and within `FULL_SIZE_LOGITS` of the CPU provider's."""
    found: list[tuple[str, str]] = []
    for step, outcome in steps.items():
        figures = outcome.get("figures", {}) if step.startswith("check:") else {}
        for name, value in figures.items():
            if "logits" not in value:
                continue
            error = value["logits"]["relative"]
            status = "met" if figures["reference"]["is_finite"] and error < FULL_SIZE_LOGITS else "MISSED"
            said = f"tokens {value['same_tokens']:.1%}, logits {error:.1e}; {status}"
            found.append((f"{step} {name} against the cpu", said))
    return found
