"""A page of all images with what was found in them: one HTML file, which needs no server and no network."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from florence_onnx.errors import FlorenceError, InputError
from florence_onnx.forms.labelled import LabelledImage, find_image
from florence_onnx.images import decoding, url

THUMBNAIL = 480
"""Most pixels of a side of a small image."""


def write(images: Sequence[LabelledImage], out: Path, folder: Path | None = None, *, thumbnails: bool = False) -> None:
    """Writes the page.

    Args:
        images: Images, those with errors too.
        out: The HTML file. It refers to the images by their places relative to it.
        folder: Where the images are; None for where their sources say.
        thumbnails: Whether to write small JPEG images beside it, for many or large images.

    Raises:
        InputError: A file cannot be written.
    """
    entries = []
    small = out.with_name(f"{out.stem}-images")
    for image in images:
        path = find_image(image, folder)
        entry = {
            **{name: getattr(image, name) for name in ("source", "task", "width", "height", "text", "error")},
            "file": _address(image, path, out),
            "thumbnail": _thumbnail(image, path, small) if thumbnails and path is not None else None,
            "shapes": [
                {**asdict(shape), "points": [[round(x, 1), round(y, 1)] for x, y in shape.corners]}
                for shape in image.shapes
            ],
        }
        entries.append(entry)
    template = resources.files(__package__).joinpath("gallery.html").read_text(encoding="utf-8")
    # no text of an answer may end the script element that it stands in
    data = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    try:
        out.write_text(template.replace("__DATA__", data, 1), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error


def _address(image: LabelledImage, path: Path | None, out: Path) -> str | None:
    if path is not None:
        return quote(os.path.relpath(path, out.parent).replace(os.sep, "/"))
    return image.source if url.is_url(image.source) else None


def _thumbnail(image: LabelledImage, path: Path, folder: Path) -> str | None:
    try:
        loaded = decoding.load(path)
    except FlorenceError:
        return None
    loaded.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        loaded.save(folder / f"{image.name}.jpg", "JPEG", quality=85)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return quote(f"{folder.name}/{image.name}.jpg")
