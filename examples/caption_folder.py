"""Captions every image in a folder and writes the captions to a CSV file.

    python examples/caption_folder.py photos/ captions.csv --model onnx-community/Florence-2-base-ft

The images are answered in batches. A file that is not an image is reported on standard error and left out, and the exit
code is then 1.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from florence_onnx import EncodedImage, Florence2, ImageError, tasks

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def find_images(folder: Path) -> list[Path]:
    """Finds the image files of a folder and its subfolders, by suffix, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def batches(paths: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    """Splits paths into batches of `size`; the last may be smaller."""
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


def main() -> int:
    """Reads the arguments, writes the captions, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with images")
    parser.add_argument("output", type=Path, help="CSV file to write, with the columns file and caption")
    parser.add_argument("--model", default="demo", help="bundle directory, hub repository or demo (%(default)s)")
    parser.add_argument("--task", default="caption", help="caption, detailed-caption or more-detailed-caption")
    parser.add_argument("--batch-size", type=int, default=8, help="images in a batch (%(default)s)")
    arguments = parser.parse_args()

    task = tasks.get(arguments.task)
    model = Florence2.from_pretrained(arguments.model)
    num_failed = 0
    with arguments.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption"])
        for batch in batches(find_images(arguments.folder), arguments.batch_size):
            images: dict[Path, EncodedImage] = {}
            for path in batch:
                try:
                    images[path] = model.encode(path)
                except ImageError as error:
                    num_failed += 1
                    print(f"{path}: {error}", file=sys.stderr)
            predictions = model.run_batch(task, images.values()) if images else []
            for path, prediction in zip(images, predictions, strict=True):
                writer.writerow([path.relative_to(arguments.folder).as_posix(), prediction.results])
    print(f"wrote {arguments.output}")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
