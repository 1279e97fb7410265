"""Boxes and outlines for annotation tools and trainers: COCO, YOLO, VOC, LabelMe, CreateML, FiftyOne, CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from florence_onnx.errors import MissingExtraError
from florence_onnx.forms.labelled import Classes, LabelledImage, Shape


def coco_annotation(shape: Shape, annotation_id: int, image_id: int, category_id: int) -> dict[str, Any]:
    """A shape as COCO's annotation: pixels, `bbox` as `[x, y, w, h]`; quads and outlines have a `segmentation`."""
    x0, y0, x1, y1 = shape.bounds
    flat = [value for point in shape.points for value in point]
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": shape.area,
        "segmentation": [] if shape.kind == "box" else [flat],
        "iscrowd": 0,
        **({} if shape.score is None else {"score": shape.score}),
        **({"attributes": {"text": shape.text}} if shape.text else {}),
    }


def coco(images: Sequence[LabelledImage], classes: Classes, *, rle: bool = False) -> dict[str, Any]:
    """A data set in COCO's form, ids from 1; `score` in annotations that have one.

    Args:
        images: Images.
        classes: Categories.
        rle: Whether outlines are masks in COCO's compressed run lengths instead of points.

    Raises:
        MissingExtraError: `rle`, and pycocotools is not installed.
    """
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, 1):
        for shape in image.shapes:
            entry = coco_annotation(shape, len(annotations) + 1, image_id, classes.index(shape.label) + 1)
            if rle and entry["segmentation"]:
                entry["segmentation"] = _rle(entry["segmentation"], image)
            annotations.append(entry)
    return {
        "info": {"description": "Answers of Florence-2, written by florence_onnx"},
        "images": [
            {"id": number, "file_name": image.source, "width": image.width, "height": image.height}
            for number, image in enumerate(images, 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes.names, 1)],
        "annotations": annotations,
    }


def _rle(points: list[list[float]], image: LabelledImage) -> dict[str, Any]:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise MissingExtraError("pycocotools", "evaluate") from error
    found = mask.merge(mask.frPyObjects(points, image.height, image.width))
    return {"size": list(found["size"]), "counts": found["counts"].decode("ascii")}


def yolo(image: LabelledImage, classes: Classes) -> str:
    """A label file: `class cx cy w h` a line, shares of width and height; outlines as `class x1 y1 x2 y2 …`."""
    lines = []
    for shape in image.shapes:
        if shape.kind == "box":
            x0, y0, x1, y1 = shape.bounds
            values = [(x0 + x1) / 2 / image.width, (y0 + y1) / 2 / image.height]
            values += [(x1 - x0) / image.width, (y1 - y0) / image.height]
        else:
            values = [part for x, y in shape.points for part in (x / image.width, y / image.height)]
        lines.append(f"{classes.index(shape.label)} {' '.join(f'{value:.6f}' for value in values)}")
    return "".join(f"{line}\n" for line in lines)


def write_yolo(images: Sequence[LabelledImage], classes: Classes, out: Path) -> None:
    """Writes `labels/NAME.txt`, `classes.txt` and `data.yaml` into a folder."""
    (out / "labels").mkdir(parents=True, exist_ok=True)
    for image in images:
        (out / "labels" / f"{image.stem}.txt").write_text(yolo(image, classes), encoding="utf-8")
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in classes.names), encoding="utf-8")
    # JSON is YAML, and takes care of names with colons and quotes
    names = "\n".join(f"  - {json.dumps(name, ensure_ascii=False)}" for name in classes.names)
    (out / "data.yaml").write_text(
        f"path: .\ntrain: images\nval: images\nnc: {len(classes.names)}\nnames:{f'{chr(10)}{names}' if names else ' []'}\n",
        encoding="utf-8",
    )


def voc(image: LabelledImage) -> bytes:
    """PASCAL VOC's XML: whole pixels counted from 1, both ends included."""
    root = ElementTree.Element("annotation")
    for name, value in (("folder", ""), ("filename", image.name), ("path", image.source)):
        ElementTree.SubElement(root, name).text = xml_text(value)
    size = ElementTree.SubElement(root, "size")
    for name, number in (("width", image.width), ("height", image.height), ("depth", 3)):
        ElementTree.SubElement(size, name).text = str(number)
    for shape in image.shapes:
        entry = ElementTree.SubElement(root, "object")
        for name, value in (("name", shape.label), ("pose", "Unspecified"), ("truncated", "0"), ("difficult", "0")):
            ElementTree.SubElement(entry, name).text = xml_text(value)
        if shape.score is not None:
            ElementTree.SubElement(entry, "score").text = f"{shape.score:.6f}"
        box = ElementTree.SubElement(entry, "bndbox")
        x0, y0, x1, y1 = map(round, shape.bounds)
        # the last pixel of a box whose edge is at x1 is the pixel x1, counted from 1
        numbers = (x0 + 1, y0 + 1, max(x0 + 1, x1), max(y0 + 1, y1))
        for name, number in zip(("xmin", "ymin", "xmax", "ymax"), numbers, strict=True):
            ElementTree.SubElement(box, name).text = str(number)
    return xml_bytes(root)


def labelme(image: LabelledImage) -> dict[str, Any]:
    """LabelMe's JSON, with the fields of X-AnyLabeling; of text the label is `text`, and what it says in `description`."""
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": [
            {
                "label": shape.label,
                "score": shape.score,
                "points": [list(point) for point in shape.points],
                "group_id": None,
                "description": shape.text,
                "difficult": False,
                "shape_type": "rectangle" if shape.kind == "box" else "polygon",
                "flags": {},
                "attributes": {},
            }
            for shape in image.shapes
        ],
        "imagePath": image.source,
        "imageData": None,
        "imageHeight": image.height,
        "imageWidth": image.width,
    }


def create_ml(images: Iterable[LabelledImage]) -> list[dict[str, Any]]:
    """CreateML's JSON: centres and sizes in pixels."""
    return [
        {
            "image": image.name,
            "annotations": [
                {
                    "label": shape.label,
                    "coordinates": {"x": (x0 + x1) / 2, "y": (y0 + y1) / 2, "width": x1 - x0, "height": y1 - y0},
                }
                for shape in image.shapes
                for x0, y0, x1, y1 in (shape.bounds,)
            ],
        }
        for image in images
    ]


def fiftyone(images: Iterable[LabelledImage], classes: Classes) -> dict[str, Any]:
    """`labels.json` of FiftyOne's `FiftyOneImageDetectionDataset`: boxes as shares of the image, by the names of their files."""
    return {
        "classes": list(classes.names),
        "labels": {
            image.stem: [
                {
                    "label": shape.label,
                    "bounding_box": [
                        x0 / image.width,
                        y0 / image.height,
                        (x1 - x0) / image.width,
                        (y1 - y0) / image.height,
                    ],
                    **({} if shape.score is None else {"confidence": shape.score}),
                }
                for shape in image.shapes
                for x0, y0, x1, y1 in (shape.bounds,)
            ]
            for image in images
        },
    }


_COLUMNS = ("image", "task", "label", "kind", "score", "xmin", "ymin", "xmax", "ymax", "text", "error")


def table(images: Iterable[LabelledImage]) -> str:
    """CSV, a line a shape; of images without one, a line with the text or the error.

    A text that begins with `=`, `+`, `-`, `@`, a tab or a line feed gets an apostrophe in front: spreadsheets would run it as a formula.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(_COLUMNS)
    for image in images:
        head = [_cell(image.source), _cell(image.task)]
        for shape in image.shapes:
            numbers = [f"{number:.2f}" for number in shape.bounds]
            score = "" if shape.score is None else f"{shape.score:.6f}"
            writer.writerow([*head, _cell(shape.label), shape.kind, score, *numbers, _cell(shape.text), ""])
        if not image.shapes:
            score = "" if image.score is None else f"{image.score:.6f}"
            writer.writerow([*head, "", "", score, "", "", "", "", _cell(image.text), _cell(image.error or "")])
    return file.getvalue()


def _cell(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") and text[:1] else text


_NOT_XML = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")


def xml_bytes(root: ElementTree.Element) -> bytes:
    """An XML file, indented, in UTF-8."""
    ElementTree.indent(root)
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content


def xml_text(text: str) -> str:
    """A text without the characters that XML cannot hold."""
    return _NOT_XML.sub("", text)
