"""Writes images in a form, chosen by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence_onnx.errors import InputError
from florence_onnx.forms import boxes, gallery, label_studio, pages, searchable_pdf
from florence_onnx.forms.labelled import Classes, LabelledImage

FOLDERS = {"yolo", "voc", "labelme", "alto", "page"}
"""Forms that are a folder with a file for each image; the others are one file."""


@dataclass(frozen=True)
class Writing:
    """Where and how a form is written."""

    out: Path
    folder: Path | None = None
    """Where the images are, for `pdf` and `html`; None for where their sources say."""
    url_prefix: str = ""
    """For `label-studio`: what makes an address of a source."""
    rle: bool = False
    """For `coco`: outlines as run lengths."""
    thumbnails: bool = False
    """For `html`: small images beside it."""
    dpi: float = 150.0
    """For `pdf`: pixels of an image in an inch of its page."""


def write(form: str, images: Sequence[LabelledImage], classes: Classes, writing: Writing) -> list[str]:
    """Writes images in a form.

    Args:
        form: One of `FORMS`.
        images: Images; only `html` and `csv` show those with errors.
        classes: Of their shapes.
        writing: Where and how.

    Returns:
        Notes for the user.

    Raises:
        InputError: The form is unknown, or a file cannot be written.
        MissingExtraError: A library for it is missing.
    """
    if form not in FORMS:
        raise InputError(f"the form must be one of {', '.join(FORMS)}, got {form!r}")
    answered = [image for image in images if image.error is None and image.width > 0 and image.height > 0]
    try:
        (writing.out if form in FOLDERS else writing.out.parent).mkdir(parents=True, exist_ok=True)
        return FORMS[form](images if form in ("html", "csv") else answered, classes, writing)
    except OSError as error:
        raise InputError(f"{writing.out} cannot be written: {error.strerror or error}") from error


def _json(path: Path, content: Any) -> list[str]:
    path.write_text(
        json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="backslashreplace"
    )
    return []


def _yolo(images: Sequence[LabelledImage], classes: Classes, writing: Writing) -> list[str]:
    boxes.write_yolo(images, classes, writing.out)
    return []


def _each(suffix: str, content: Callable[[LabelledImage], bytes]) -> Any:
    def write_files(images: Sequence[LabelledImage], classes: Classes, writing: Writing) -> list[str]:
        for image in images:
            (writing.out / f"{image.stem}{suffix}").write_bytes(content(image))
        return []

    return write_files


def _label_studio(images: Sequence[LabelledImage], classes: Classes, writing: Writing) -> list[str]:
    _json(writing.out, label_studio.tasks(images, writing.url_prefix))
    configuration = writing.out.with_suffix(".xml")
    configuration.write_text(label_studio.configuration(classes.names), encoding="utf-8")
    return [f"{configuration} is the labelling configuration of the project"]


def _pdf(images: Sequence[LabelledImage], classes: Classes, writing: Writing) -> list[str]:
    missing = searchable_pdf.write(images, writing.out, writing.folder, writing.dpi)
    return [f"{len(missing)} images have no page, since their file is missing or damaged"] if missing else []


def _text(content: Callable[[Sequence[LabelledImage]], str]) -> Any:
    def write_file(images: Sequence[LabelledImage], classes: Classes, writing: Writing) -> list[str]:
        writing.out.write_text(content(images), encoding="utf-8", errors="backslashreplace", newline="")
        return []

    return write_file


def _gallery(images: Sequence[LabelledImage], classes: Classes, writing: Writing) -> list[str]:
    gallery.write(images, writing.out, writing.folder, thumbnails=writing.thumbnails)
    return []


Write = Callable[[Sequence[LabelledImage], Classes, Writing], list[str]]
FORMS: dict[str, Write] = {
    "coco": lambda images, classes, to: _json(to.out, boxes.coco(images, classes, rle=to.rle)),
    "yolo": _yolo,
    "voc": _each(".xml", boxes.voc),
    "labelme": _each(
        ".json",
        lambda image: json.dumps(boxes.labelme(image), ensure_ascii=False, indent=1).encode(
            "utf-8", "backslashreplace"
        ),
    ),
    "label-studio": _label_studio,
    "fiftyone": lambda images, classes, to: _json(to.out, boxes.fiftyone(images, classes)),
    "createml": lambda images, classes, to: _json(to.out, boxes.create_ml(images)),
    "hocr": _text(pages.hocr),
    "alto": _each(".xml", pages.alto),
    "page": _each(".xml", pages.page_xml),
    "pdf": _pdf,
    "csv": _text(boxes.table),
    "html": _gallery,
}
"""What writes each form."""
