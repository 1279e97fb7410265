"""Reads the text in images and writes it to text files, one line of text per line.

    python examples/ocr_to_text.py page-1.png page-2.png --output text/

The lines come from `ocr-with-region`, so that they can be sorted from top to bottom and, at the same height, from left
to right. `--json` writes the position of each line as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from florence_onnx import Florence2, OCRBoundingBoxSingle, tasks


def reading_order(boxes: Sequence[OCRBoundingBoxSingle]) -> list[OCRBoundingBoxSingle]:
    """Sorts text boxes by row, then from left to right.

    A box belongs to the current row if its centre lies above the lower edge of the row's first box. Columns are not
    detected: a page in columns is read across them.
    """
    rows: list[list[OCRBoundingBoxSingle]] = []
    for box in sorted(boxes, key=lambda box: box.y + box.h / 2):
        if rows and box.y + box.h / 2 < rows[-1][0].y + rows[-1][0].h:
            rows[-1].append(box)
        else:
            rows.append([box])
    return [box for row in rows for box in sorted(row, key=lambda box: box.x)]


def main() -> int:
    """Reads the arguments and writes the text files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="image files")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the text files (current folder)")
    parser.add_argument("--model", default="demo", help="bundle directory, hub repository or demo (%(default)s)")
    parser.add_argument("--json", action="store_true", help="write a JSON file with positions beside each text file")
    arguments = parser.parse_args()
    if len({path.stem for path in arguments.images}) < len(arguments.images):
        parser.error("two images have the same name, and so would their text files")

    model = Florence2.from_pretrained(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in arguments.images:
        prediction = model.run(tasks.OCR_WITH_REGION, path)
        lines = reading_order(prediction.results.quad_boxes)
        text_file = arguments.output / f"{path.stem}.txt"
        text_file.write_text("".join(f"{line.label}\n" for line in lines), encoding="utf-8")
        if arguments.json:
            positions = [{"text": line.label, "x": line.x, "y": line.y, "w": line.w, "h": line.h} for line in lines]
            content = json.dumps(positions, ensure_ascii=False, indent=2)
            text_file.with_suffix(".json").write_text(content, encoding="utf-8")
        if prediction.truncated:
            print(f"{path}: the answer reached the token limit; text may be missing", file=sys.stderr)
        print(f"{text_file}: {len(lines)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
