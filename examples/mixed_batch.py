"""Runs different tasks on several images as one batch and prints fal's JSON, one line per answer.

    python examples/mixed_batch.py car.jpg sign.png --ask caption --ask ocr --ask "open-vocabulary-detection=a red kite"

Every image is encoded once, for all of its tasks.
"""

from __future__ import annotations

import argparse
import json
import sys

from florence_onnx import Florence2, tasks


def main() -> int:
    """Reads the arguments, runs the batch, and prints the answers in the order of images, then tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="paths or URLs of images")
    parser.add_argument(
        "--ask",
        action="append",
        metavar="TASK[=TEXT]",
        help="task, with its text if it needs one; repeatable (caption and object-detection)",
    )
    parser.add_argument("--model", default="demo", help="bundle directory, hub repository or demo (%(default)s)")
    arguments = parser.parse_args()

    model = Florence2.from_pretrained(arguments.model)
    questions = [question.partition("=") for question in arguments.ask or ["caption", "object-detection"]]
    images = {name: model.encode(name) for name in arguments.images}
    requests = [(name, tasks.get(slug), text or None) for name in images for slug, _, text in questions]
    predictions = model.run_batch(
        [task for _, task, _ in requests],
        [images[name] for name, _, _ in requests],
        text_inputs=[text for _, _, text in requests],
    )
    for (name, task, _), prediction in zip(requests, predictions, strict=True):
        print(json.dumps({"image": name, "task": task.slug, "results": prediction.to_dict()["results"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
