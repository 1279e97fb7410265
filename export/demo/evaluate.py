"""Evaluates a checkpoint with transformers: `python -m export.demo.evaluate CHECKPOINT --beams 3`.

Training makes its scenes from the seeds `"20261122:<step>"`, and those of its curves from seed 777. The default seed
here is another. Published figures come from a seed that was not used before.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Florence2ForConditionalGeneration, Florence2Processor

from .metrics import collect_questions, make_scenes, score_answers
from .questions import TASK_TOKENS, Question
from .scenes import Scene

DEFAULT_SEED = 31415
MAX_NEW_TOKENS = 100
BATCH_SIZE = 50
Report = dict[str, dict[str, float]]


def evaluate_model(
    model: Florence2ForConditionalGeneration,
    processor: Florence2Processor,
    *,
    seed: int = DEFAULT_SEED,
    num_scenes: int = 200,
    size: int = 256,
    tasks: Sequence[str] = TASK_TOKENS,
    num_beams: int = 1,
    no_repeat_ngram_size: int = 0,
) -> Report:
    """Evaluates a model on new scenes.

    Args:
        model: The model, in float32.
        processor: Its processor.
        seed: Seed of the scenes.
        num_scenes: Number of scenes.
        size: Longer side of the scenes in pixels.
        tasks: Task tokens.
        num_beams: 1 is greedy.
        no_repeat_ngram_size: 0 is off; Florence-2's default is 3.

    Returns:
        The figures of `metrics.score_answers` by task token.
    """
    scenes = make_scenes(seed, num_scenes, size)
    report = {}
    for task in tasks:
        asked = collect_questions(scenes, task)
        texts = generate_answers(
            model, processor, asked, num_beams=num_beams, no_repeat_ngram_size=no_repeat_ngram_size
        )
        parsed = [
            processor.post_process_generation(text=text, task=task, image_size=scene.size)[task]
            for (scene, _), text in zip(asked, texts, strict=True)
        ]
        parsed = [answer.replace("<pad>", "").strip() if isinstance(answer, str) else answer for answer in parsed]
        report[task] = score_answers(task, [scene for scene, _ in asked], [question for _, question in asked], parsed)
    return report


@torch.no_grad()
def generate_answers(
    model: Florence2ForConditionalGeneration,
    processor: Florence2Processor,
    asked: Sequence[tuple[Scene, Question]],
    **options: Any,
) -> list[str]:
    """Generates the answers to all questions, as text with special tokens."""
    texts: list[str] = []
    for start in range(0, len(asked), BATCH_SIZE):
        part = asked[start : start + BATCH_SIZE]
        inputs = processor(
            images=[scene.image for scene, _ in part],
            text=[question.task + question.text_input for _, question in part],
            padding=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **options)
        texts += processor.batch_decode(ids, skip_special_tokens=False)
    return texts


def summarise(report: Report) -> dict[str, float]:
    """Flattens a report to one dict without the counts: `{"<OD> recall": 0.99}`."""
    return {
        f"{task} {name}": round(value, 3)
        for task, figures in report.items()
        for name, value in figures.items()
        if not name.startswith("n")
    }


def format_report(report: Report) -> str:
    """Formats a report with one line per task."""
    lines = []
    for task, figures in report.items():
        values = "  ".join(
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        )
        lines.append(f"{task:<40} {values}")
    return "\n".join(lines)


def main() -> None:
    """Command line: prints the figures of a checkpoint folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--size", type=int, default=256, help="longer side of the scenes in pixels")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--no-repeat-ngram", type=int, default=0)
    parser.add_argument("--tasks", default=",".join(TASK_TOKENS))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    model = Florence2ForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    report = evaluate_model(
        model,
        Florence2Processor.from_pretrained(arguments.checkpoint),
        seed=arguments.seed,
        num_scenes=arguments.scenes,
        size=arguments.size,
        tasks=arguments.tasks.split(","),
        num_beams=arguments.beams,
        no_repeat_ngram_size=arguments.no_repeat_ngram,
    )
    print(format_report(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
