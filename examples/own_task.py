"""Defines a task of a fine-tuned checkpoint: a prompt of its own, and a parser that returns a type of its own.

    python examples/own_task.py photo.png --text "two circles and a star"

The task here asks where the phrases of a text are, with the prompt of `caption-to-phrase-grounding`, which the demo
model knows, and counts the boxes of each phrase. For a fine-tune with a task `<VQA>` the prompt would be the one that it
was trained on, often `"<VQA>{input}"`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from florence_onnx import Florence2
from florence_onnx.answers import postprocess
from florence_onnx.tasks import Task


def count_phrases(text: str, size: tuple[int, int]) -> Counter[str]:
    """Parses generated text: how many boxes each phrase has.

    A parser is given whatever the model generates, so it must accept any string.

    Args:
        text: Generated text, with special and location tokens.
        size: (width, height) of the image in pixels.
    """
    return Counter(box.label for box in postprocess.phrase_grounding(text, size).bboxes)


COUNT_PHRASES = Task(
    slug="count-phrases",
    token="<COUNT_PHRASES>",
    prompt="Locate the phrases in the caption: {input}",
    needs="text",
    parser=count_phrases,
    has_image=False,
)


def main() -> int:
    """Reads the arguments, runs the task, and prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="path or URL of the image")
    parser.add_argument("--text", required=True, help="text whose phrases are looked for")
    parser.add_argument("--model", default="demo", help="bundle directory, hub repository or demo (%(default)s)")
    arguments = parser.parse_args()

    model = Florence2.from_pretrained(arguments.model)
    prediction = model.run(COUNT_PHRASES, arguments.image, text_input=arguments.text)
    for phrase, count in prediction.results.most_common():
        print(f"{count} {phrase}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
