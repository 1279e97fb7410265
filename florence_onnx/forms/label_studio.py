"""Label Studio's tasks with predictions, ready to be imported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from florence_onnx.forms.labelled import LabelledImage, Shape

BOX, OUTLINE, TEXT, IMAGE = "label", "outline", "transcription", "image"
"""Names of the tags in the labelling configuration."""


def tasks(images: Iterable[LabelledImage], url_prefix: str = "") -> list[dict[str, Any]]:
    """Tasks, one an image, each with one prediction; coordinates are percentages of width and height.

    Args:
        images: Images.
        url_prefix: Put before the source to make the address by which Label Studio loads an image, such as
            `/data/local-files/?d=`.
    """
    return [
        {"data": {IMAGE: _address(image.source, url_prefix)}, "predictions": [prediction(image)]}
        for image in images
        if image.error is None
    ]


def _address(source: str, prefix: str) -> str:
    return f"{prefix}{quote(source)}" if prefix else source


def prediction(image: LabelledImage) -> dict[str, Any]:
    """The prediction of an image: its results, and the mean score."""
    results: list[dict[str, Any]] = []
    for number, shape in enumerate(image.shapes):
        results += _results(image, shape, number)
    if not image.shapes and image.text:
        results.append({"from_name": TEXT, "to_name": IMAGE, "type": "textarea", "value": {"text": [image.text]}})
    scores = [shape.score for shape in image.shapes if shape.score is not None]
    score = sum(scores) / len(scores) if scores else image.score
    return {
        "model_version": f"florence_onnx {image.model}",
        "result": results,
        **({} if score is None else {"score": score}),
    }


def _results(image: LabelledImage, shape: Shape, number: int) -> list[dict[str, Any]]:
    """A shape; of a quad also its text, under the same id."""
    key = hashlib.sha256(f"{image.source}#{image.task}#{number}".encode()).hexdigest()[:10]
    common = {
        "id": key,
        "to_name": IMAGE,
        "original_width": image.width,
        "original_height": image.height,
        "image_rotation": 0,
        **({} if shape.score is None else {"score": shape.score}),
    }
    percent = [[100 * x / image.width, 100 * y / image.height] for x, y in shape.corners]
    if shape.kind == "box":
        (x0, y0), _, (x1, y1), _ = percent
        value = {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "rotation": 0, "rectanglelabels": [shape.label]}
        box = {**common, "from_name": BOX, "type": "rectanglelabels", "value": value}
        place = {name: value[name] for name in ("x", "y", "width", "height", "rotation")}
        text = {**common, "from_name": TEXT, "type": "textarea", "value": {**place, "text": [shape.text]}}
        return [box, text] if shape.text else [box]
    outline = {
        **common,
        "from_name": OUTLINE,
        "type": "polygonlabels",
        "value": {"points": percent, "closed": True, "polygonlabels": [shape.label]},
    }
    if not shape.text:
        return [outline]
    held = {"points": percent, "closed": True, "text": [shape.text]}
    return [outline, {**common, "from_name": TEXT, "type": "textarea", "value": held}]


def configuration(labels: Iterable[str]) -> str:
    """The labelling configuration of a project for such tasks."""
    from xml.sax.saxutils import quoteattr

    values = "".join(f"\n    <Label value={quoteattr(label)}/>" for label in labels)
    return f"""<View>
  <Image name="{IMAGE}" value="${IMAGE}" zoom="true"/>
  <RectangleLabels name="{BOX}" toName="{IMAGE}">{values}
  </RectangleLabels>
  <PolygonLabels name="{OUTLINE}" toName="{IMAGE}">
    {values.strip()}
  </PolygonLabels>
  <TextArea name="{TEXT}" toName="{IMAGE}" perRegion="true" editable="true"/>
</View>
"""
