"""What prompt lookup saves: `python -m benchmarks.cpu.speculation [--scenes N] [--bundle DIRECTORY]`.

Every task is run on the same unseen scenes, greedily, with drafts of several lengths. Decoder calls are counted, which
do not depend on the machine. Times are CPU time from the encoded image to the answer, which depends little on other
processes. The answers are compared token by token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from export.demo.metrics import collect_questions, make_scenes
from export.demo.questions import TASK_TOKENS, Question
from florence_onnx import Florence2, GenerationOptions, tasks
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.generation.options import DEFAULT_PROMPT_LOOKUP
from florence_onnx.prediction import EncodedImage

RESULTS = Path(__file__).parents[1] / "results"
LENGTHS = (0, 2, 4, 8)
SEED = 20250903
"""Seed of the scenes; it is used neither in training nor for other figures."""


@dataclass
class Figures:
    """Sums over all questions of one task."""

    questions: int = 0
    tokens: int = 0
    """Tokens of the answers without speculation."""
    other_tokens: int = 0
    """Tokens that differ with speculation, over all draft lengths."""
    calls: dict[int, int] = field(default_factory=lambda: dict.fromkeys(LENGTHS, 0))
    """Decoder calls by draft length."""
    seconds: dict[int, float] = field(default_factory=lambda: dict.fromkeys(LENGTHS, 0.0))
    """CPU time by draft length."""

    def saved(self, length: int) -> float:
        """Returns the share of the decoder calls that drafts of a length save."""
        return 1 - self.calls[length] / self.calls[0]


def measure(model: Florence2, questions: Sequence[tuple[EncodedImage, Question]]) -> Figures:
    """Answers every question with every draft length."""
    figures = Figures()
    for encoded, question in questions:
        answers = {length: ask(model, encoded, question, length, figures) for length in LENGTHS}
        figures.questions += 1
        figures.tokens += len(answers[0])
        for answer in answers.values():
            same = sum(a == b for a, b in zip(answer, answers[0], strict=False))
            figures.other_tokens += max(len(answer), len(answers[0])) - same
    return figures


def ask(model: Florence2, encoded: EncodedImage, question: Question, length: int, figures: Figures) -> tuple[int, ...]:
    """Answers a question, and adds its decoder calls and seconds to the figures."""
    decoder = model._text_model._decoder  # type: ignore[attr-defined]
    calls, start = decoder.num_runs, time.process_time()
    options = GenerationOptions(num_beams=1, prompt_lookup_num_tokens=length)
    answer = model.run(question.task, encoded, text_input=question.text, region=question.region, options=options)
    figures.seconds[length] += time.process_time() - start
    figures.calls[length] += decoder.num_runs - calls
    return answer.token_ids


def table(measured: dict[str, Figures]) -> str:
    """Returns a Markdown table with a row per task."""
    lines = [
        "| task | tokens an answer | calls an answer | "
        + " | ".join(f"saved, drafts of {length}" for length in LENGTHS[1:])
        + f" | time, drafts of {DEFAULT_PROMPT_LOOKUP} | other tokens |",
        "|---" * (len(LENGTHS) + 4) + "|",
    ]
    for name, each in measured.items():
        saved = " | ".join(f"{each.saved(length):.0%}" for length in LENGTHS[1:])
        ratio = each.seconds[DEFAULT_PROMPT_LOOKUP] / each.seconds[0]
        lines.append(
            f"| {name} | {each.tokens / each.questions:.1f} | {each.calls[0] / each.questions:.1f} | {saved} "
            f"| {ratio:.2f} | {each.other_tokens} |"
        )
    return "\n".join(lines)


def total(measured: dict[str, Figures]) -> Figures:
    """Returns the sums over all tasks."""
    found = Figures()
    for each in measured.values():
        found.questions += each.questions
        found.tokens += each.tokens
        found.other_tokens += each.other_tokens
        for length in LENGTHS:
            found.calls[length] += each.calls[length]
            found.seconds[length] += each.seconds[length]
    return found


def main() -> None:
    """Measures, prints a table and a line of JSON, and writes both to `benchmarks/results`."""
    parser = argparse.ArgumentParser(description="What prompt lookup saves, task by task.")
    parser.add_argument("--scenes", type=int, default=40, help="number of drawn scenes")
    parser.add_argument("--bundle", default=DEMO, help="bundle directory, or demo")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of speculation.md and speculation.json")
    arguments = parser.parse_args()
    model = Florence2.from_pretrained(arguments.bundle, device="cpu", session_options={"intra_op_num_threads": 1})
    scenes = make_scenes(SEED, arguments.scenes)
    encoded = {id(scene): model.encode(scene.image) for scene in scenes}
    model.warm_up()
    measured = {}
    for token in TASK_TOKENS:
        asked = [(encoded[id(scene)], question) for scene, question in collect_questions(scenes, token)]
        measured[tasks.get(token).slug] = measure(model, asked)
    measured["all"] = total(measured)
    name = "the demo model" if arguments.bundle == DEMO else Path(arguments.bundle).name
    text = (
        f"Decoder calls with prompt lookup, greedy, {name}, {arguments.scenes} scenes, one thread; time is the ratio "
        "of CPU time from the encoded image to the answer, without vision.\n"
        f"`python -m benchmarks.cpu.speculation --scenes {arguments.scenes}`\n\n{table(measured)}\n"
    )
    line = json.dumps({"scenes": arguments.scenes, "tasks": {name: asdict(each) for name, each in measured.items()}})
    print(text)
    print(line)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "speculation.md").write_text(text, encoding="utf-8")
    (arguments.output / "speculation.json").write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
