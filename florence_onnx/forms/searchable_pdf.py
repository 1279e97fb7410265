"""A PDF document whose pages are images with their text beneath, which can be searched and copied. Needs the extra `forms`.

The text is set in a font without glyphs whose codes are UTF-16, so that any script can be found; nothing of it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from florence_onnx.errors import FlorenceError, InputError, MissingExtraError
from florence_onnx.forms.labelled import LabelledImage, Shape, find_image
from florence_onnx.forms.pages import lines_of
from florence_onnx.images import decoding

POINTS = 72.0
"""PDF's units in an inch."""
_UNICODE = b"""/CIDInit /ProcSet findresource begin
12 dict begin
begincmap
/CIDSystemInfo << /Registry (Adobe) /Ordering (UCS) /Supplement 0 >> def
/CMapName /Adobe-Identity-UCS def
/CMapType 2 def
1 begincodespacerange
<0000> <FFFF>
endcodespacerange
1 beginbfrange
<0000> <FFFF> <0000>
endbfrange
endcmap
CMapName currentdict /CMap defineresource pop
end
end
"""


def write(images: Sequence[LabelledImage], out: Path, folder: Path | None = None, dpi: float = 150.0) -> list[str]:
    """Writes a document, a page an image.

    Args:
        images: With lines of text.
        out: The file.
        folder: Where the images are; None for where their sources say.
        dpi: Pixels of an image in an inch of its page.

    Returns:
        The sources of images that have no page, since their file is missing or damaged.

    Raises:
        InputError: None has a page, or the file cannot be written.
        MissingExtraError: pikepdf is not installed.
    """
    try:
        import pikepdf
    except ImportError as error:
        raise MissingExtraError("pikepdf", "forms") from error
    missing = []
    with pikepdf.new() as document:
        font = _font(document)
        for image in images:
            path = find_image(image, folder)
            try:
                loaded = None if path is None else decoding.load(path)
            except FlorenceError:
                loaded = None
            if path is None or loaded is None:
                missing.append(image.source)
                continue
            _add_page(document, font, image, path, loaded, POINTS / dpi)
        if not len(document.pages):
            raise InputError(
                f"no image of these rows can be read: give their folder with --images ({', '.join(missing[:3])})"
            )
        try:
            document.save(out)
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    return missing


def _font(document: Any) -> Any:
    """A font without glyphs, half an em wide, in which each code is its own character."""
    from pikepdf import Array, Dictionary, Name

    descendant = Dictionary(
        Type=Name.Font,
        Subtype=Name.CIDFontType2,
        BaseFont=Name.GlyphLess,
        CIDSystemInfo=Dictionary(Registry=b"Adobe", Ordering=b"Identity", Supplement=0),
        DW=500,
        FontDescriptor=Dictionary(
            Type=Name.FontDescriptor,
            FontName=Name.GlyphLess,
            Flags=5,
            FontBBox=Array([0, 0, 500, 1000]),
            ItalicAngle=0,
            Ascent=1000,
            Descent=-1,
            CapHeight=1000,
            StemV=80,
        ),
    )
    return document.make_indirect(
        Dictionary(
            Type=Name.Font,
            Subtype=Name.Type0,
            BaseFont=Name.GlyphLess,
            Encoding=Name("/Identity-H"),
            DescendantFonts=Array([document.make_indirect(descendant)]),
            ToUnicode=document.make_stream(_UNICODE),
        )
    )


def _add_page(document: Any, font: Any, image: LabelledImage, path: Path, loaded: Image.Image, scale: float) -> None:
    from pikepdf import Dictionary, Name

    width, height = loaded.size[0] * scale, loaded.size[1] * scale
    page = document.add_blank_page(page_size=(width, height))
    page.Resources = Dictionary(XObject=Dictionary(Im0=_image_object(document, path, loaded)), Font=Dictionary(F0=font))
    lines = [f"q {width:.4f} 0 0 {height:.4f} 0 0 cm /Im0 Do Q", "BT 3 Tr"]
    lines += [_text(shape, height, scale) for shape in lines_of(image) if shape.text.strip()]
    page.Contents = document.make_stream("\n".join([*lines, "ET"]).encode("ascii"))
    page.Type = Name.Page


def _image_object(document: Any, path: Path, loaded: Image.Image) -> Any:
    """The image; a JPEG file that needs no turning goes in as it is."""
    from pikepdf import Name, Stream

    with Image.open(path) as original:
        as_is = original.format == "JPEG" and original.mode in ("RGB", "L") and original.getexif().get(274, 1) == 1
        mode = original.mode
    common = {
        "Type": Name.XObject,
        "Subtype": Name.Image,
        "Width": loaded.size[0],
        "Height": loaded.size[1],
        "BitsPerComponent": 8,
    }
    if as_is:
        colours = Name.DeviceGray if mode == "L" else Name.DeviceRGB
        return Stream(document, path.read_bytes(), ColorSpace=colours, Filter=Name.DCTDecode, **common)
    return Stream(document, loaded.tobytes(), ColorSpace=Name.DeviceRGB, **common)  # compressed when it is saved


def _text(shape: Shape, page_height: float, scale: float) -> str:
    """A line of text, as long and as high as its quad, along its lower edge."""
    top_left, _, bottom_right, bottom_left = shape.corners if len(shape.corners) == 4 else _frame(shape)
    width = max(1e-3, math.dist(bottom_left, bottom_right) * scale)
    size = max(1.0, math.dist(top_left, bottom_left) * scale)
    angle = math.atan2(bottom_left[1] - bottom_right[1], bottom_right[0] - bottom_left[0])
    text = " ".join(shape.text.split())
    stretch = 100 * width / (0.5 * size * len(text.encode("utf-16-be")) / 2)
    x, y = bottom_left[0] * scale, page_height - bottom_left[1] * scale
    cosine, sine = math.cos(angle), math.sin(angle)
    codes = text.encode("utf-16-be", "replace").hex().upper()
    return f"/F0 {size:.4f} Tf {stretch:.4f} Tz {cosine:.6f} {sine:.6f} {-sine:.6f} {cosine:.6f} {x:.4f} {y:.4f} Tm <{codes}> Tj"


def _frame(shape: Shape) -> tuple[tuple[float, float], ...]:
    x0, y0, x1, y1 = shape.bounds
    return (x0, y0), (x1, y0), (x1, y1), (x0, y1)
