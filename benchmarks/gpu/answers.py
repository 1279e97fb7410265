"""Correctness on the GPU: answers and logits against this runtime on the CPU and against transformers.

The demo model is trained, so its answers are meaningful. Full-size models have random weights; their logits on the GPU
are compared with those of the CPU provider for the same bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.gpu.figures import Figures
from benchmarks.gpu.sources import DEMO, Sources
from benchmarks.models import ROOT
from export.verification.photograph import PHOTOGRAPH
from florence_onnx import Florence2, GenerationOptions, Region, tasks
from florence_onnx.bundles import bundle as bundles

SAMPLES = ROOT / "florence_onnx" / "demo" / "samples"
GIVEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "text": {"text_input": "red circle"},
    "region": {"region": Region(217, 475, 377, 648)},
}
"""Inputs of a question besides its image, by the `needs` of its task."""
MAX_NEW_TOKENS = 100
SEARCHES = {"greedy": 1, "beams": 3}
NUM_SHOWN = 6
"""Differing answers that are listed."""
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """One task on one of the sample images."""

    image: Path
    task: tasks.Task[Any]

    @property
    def given(self) -> dict[str, Any]:
        return GIVEN[self.task.needs]

    @property
    def name(self) -> str:
        return f"{self.image.stem} {self.task.slug}"


def questions(num_images: int) -> list[Question]:
    """Returns every task on each of the first images."""
    images = sorted(SAMPLES.glob("*.png"))[:num_images]
    return [Question(image, task) for image in images for task in tasks.TASKS.values()]


def share_equal(found: Sequence[Tokens], expected: Sequence[Tokens]) -> dict[str, Any]:
    """Returns the shares of equal `answers` and `tokens`, the `count`, and the indices of `different` answers."""
    pairs = list(zip(found, expected, strict=True))
    places = sum(max(len(a), len(b)) for a, b in pairs)
    equal = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    different = [place for place, (a, b) in enumerate(pairs) if a != b]
    return {
        "answers": 1 - len(different) / len(pairs),
        "tokens": equal / places,
        "count": len(pairs),
        "different": different[:NUM_SHOWN],
    }


def logits_error(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> dict[str, float]:
    """Compares logits `(L, V)`: largest and relative (Frobenius) error, and the share of rows with equal argmax.

    If a logit is not finite, the errors are larger than any bar.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        difference = found.astype(np.float64) - expected
        relative = float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))
        greatest = float(np.abs(difference).max())
    is_finite = bool(np.isfinite(found).all() and np.isfinite(expected).all())
    same = float((found.argmax(axis=-1) == expected.argmax(axis=-1)).mean())
    return {"relative": relative if is_finite else 1e9, "greatest": greatest if is_finite else 1e9, "same_best": same}


def own_variants(device: str, sources: Sources) -> dict[str, dict[str, Any]]:
    """Returns arguments of `from_pretrained` for the demo model by the name of the variant, fp32 first."""
    kinds = [kind for kind in ("fp32", "fp16") if sources.has(DEMO, kind)]
    found: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        common = {"name": sources.bundle(DEMO, kind), "device": device}
        if device == "cpu":
            found[f"ours {kind} resident"] = {**common, "max_batch": 8}
            continue
        no_tf32 = {"use_tf32": 0} if kind == "fp32" else {}
        found[f"ours {kind}"] = {**common, "provider_options": no_tf32}
        found[f"ours {kind} no graphs"] = {**common, "provider_options": {**no_tf32, "enable_cuda_graph": 0}}
        if no_tf32:
            found[f"ours {kind} as it comes"] = common
    return found


def compare_demo(device: str, sources: Sources, asked: Sequence[Question], figures: Figures) -> None:
    """Compares all variants with two references: our CPU provider, and transformers in fp32 on the device.

    The figures are named `VARIANT against REFERENCE`. They have the shares of equal answers by search, and the error of
    the logits along the reference's answers.
    """
    kind = "fp32" if sources.has(DEMO, "fp32") else "fp16"
    reference = _Ours(Florence2.from_pretrained(sources.bundle(DEMO, kind), device="cpu"), asked)
    figures.add("reference", f"ours on the cpu, {kind}")
    references: dict[str, _Answers] = {"ours on the cpu": reference}
    for dtype in ("float32", "float16"):
        name = f"transformers {'fp32' if dtype == 'float32' else 'fp16'}"
        figures.attempt(name, partial(_add_transformers, device, dtype, sources, asked, references, name))
    for name in [each for each in references if each.startswith("transformers")]:
        figures.attempt(f"{name} against ours on the cpu", partial(_compare, references[name], reference, asked))
    against = {name: each for name, each in references.items() if name != "transformers fp16"}
    for name, arguments in own_variants(device, sources).items():
        found: list[_Answers] = []
        figures.attempt(name, partial(_add_ours, arguments, asked, found))
        for other, each in against.items() if found else ():
            figures.attempt(f"{name} against {other}", partial(_compare, found[0], each, asked))


class _Answers(Protocol):
    """The answers of one model by search, and its logits along given answers."""

    tokens: Mapping[str, list[Tokens]]

    def score(self, place: int, token_ids: Tokens) -> npt.NDArray[np.float32]:
        """Returns the logits `(L - 1, V)` of one question along an answer of L tokens."""


class _Ours(_Answers):
    def __init__(self, model: Florence2, asked: Sequence[Question]) -> None:
        self.model = model
        self._asked = asked
        self.tokens = {name: list(self._ask(beams)) for name, beams in SEARCHES.items()}

    def _ask(self, beams: int) -> Iterator[Tokens]:
        options = GenerationOptions(num_beams=beams, max_new_tokens=MAX_NEW_TOKENS)
        for question in self._asked:
            yield self.model.run(question.task, question.image, options=options, **question.given).token_ids

    def score(self, place: int, token_ids: Tokens) -> npt.NDArray[np.float32]:
        question = self._asked[place]
        return self.model.score_tokens(question.task, question.image, token_ids, **question.given)


class _Transformers(_Answers):
    def __init__(self, peer: Any, asked: Sequence[Question]) -> None:
        self._peer = peer
        self._inputs = []
        for question in asked:
            with Image.open(question.image) as opened:
                pixels = peer.pixel_values([opened.convert("RGB")])
            given = question.given
            prompt = question.task.format_prompt(given.get("text_input"), given.get("region"))
            self._inputs.append(peer.inputs(pixels, [prompt]))
        self.tokens = {name: [self._ask(inputs, beams) for inputs in self._inputs] for name, beams in SEARCHES.items()}

    def _ask(self, inputs: dict[str, Any], beams: int) -> Tokens:
        row = self._peer.generate(inputs, beams, max_new_tokens=MAX_NEW_TOKENS)[0]
        end = row.index(2, 1) + 1 if 2 in row[1:] else len(row)
        return tuple(row[:end])

    def score(self, place: int, token_ids: Tokens) -> npt.NDArray[np.float32]:
        scored: npt.NDArray[np.float32] = self._peer.score(self._inputs[place], token_ids)
        return scored


def _add_transformers(
    device: str, dtype: str, sources: Sources, asked: Sequence[Question], into: dict[str, _Answers], name: str
) -> str:
    from benchmarks.gpu.pytorch import Transformers

    bundle = bundles.read(sources.bundle(DEMO, "fp16"))
    peer = Transformers(sources.checkpoint(DEMO), bundle, "cpu" if device == "cpu" else "cuda", dtype=dtype)
    into[name] = _Transformers(peer, asked)
    return "answered"


def _add_ours(arguments: dict[str, Any], asked: Sequence[Question], into: list[_Answers]) -> str:
    model = Florence2.from_pretrained(**arguments)
    into.append(_Ours(model, asked))
    return str(model.info()["provider"])


def _compare(found: _Answers, expected: _Answers, asked: Sequence[Question]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in SEARCHES:
        shares = share_equal(found.tokens[name], expected.tokens[name])
        shares["different"] = [asked[place].name for place in shares["different"]]
        result[name] = shares
    greedy = expected.tokens["greedy"]
    chosen = range(0, len(asked), max(1, len(asked) // 12))  # a dozen answers suffice
    errors = [logits_error(found.score(place, greedy[place]), expected.score(place, greedy[place])) for place in chosen]
    worst = {name: max(error[name] for error in errors) for name in ("relative", "greatest")}
    return result | {"logits": worst | {"same_best": min(error["same_best"] for error in errors)}}


# ------------------------------------------------------------------------------------------------------------ full size


def compare_full_size(bundle: Path, device: str, num_tokens: int, figures: Figures) -> None:
    """Compares the device's logits with the CPU provider's along an answer of the latter, for the same bundle."""
    cpu = Florence2.from_pretrained(bundle, device="cpu")
    options = GenerationOptions(
        num_beams=1, max_new_tokens=num_tokens, min_new_tokens=num_tokens - 1, prompt_lookup_num_tokens=0
    )
    token_ids = cpu.run(tasks.CAPTION, PHOTOGRAPH, options=options).token_ids
    expected = cpu.score_tokens(tasks.CAPTION, PHOTOGRAPH, token_ids)
    is_finite = bool(np.isfinite(expected).all())
    figures.add("reference", {"tokens": len(token_ids), "spread": float(expected.std()), "is_finite": is_finite})
    arguments: dict[str, dict[str, Any]] = {"ours": {"device": device}}
    if device == "cpu":
        arguments = {"ours": {"device": "cpu", "max_batch": 4}}
    else:
        arguments["ours no graphs"] = {"device": device, "provider_options": {"enable_cuda_graph": 0}}
    for name, each in arguments.items():

        def compare(each: dict[str, Any] = each) -> dict[str, Any]:
            model = Florence2.from_pretrained(bundle, **each)
            same = model.run(tasks.CAPTION, PHOTOGRAPH, options=options).token_ids
            error = logits_error(model.score_tokens(tasks.CAPTION, PHOTOGRAPH, token_ids), expected)
            return {"same_tokens": share_equal([same], [token_ids])["tokens"], "logits": error}

        figures.attempt(name, compare)
