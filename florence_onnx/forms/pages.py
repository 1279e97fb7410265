"""Lines of text for readers of documents: hOCR, ALTO 4 and PAGE 2019."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from xml.etree import ElementTree

from florence_onnx._version import __version__
from florence_onnx.forms.boxes import xml_bytes, xml_text
from florence_onnx.forms.labelled import TEXT, LabelledImage, Shape

ALTO = "http://www.loc.gov/standards/alto/ns-v4#"
PAGE = "http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15"


def lines_of(image: LabelledImage) -> list[Shape]:
    """The shapes that hold text; of an answer that is text, its lines without places are one line each over the whole image."""
    if image.shapes or not image.text:
        return [replace(shape, text=shape.text or shape.label) for shape in image.shapes]
    whole = ((0.0, 0.0), (float(image.width), float(image.height)))
    return [Shape(TEXT, "box", whole, image.score, line) for line in image.text.splitlines() if line.strip()]


def hocr(images: Sequence[LabelledImage]) -> str:
    """hOCR 1.2, as XHTML: a page an image, a line a quad; `x_wconf` is the score in percent."""
    pages = []
    for number, image in enumerate(images, 1):
        name = xml_text(image.source).replace('"', "'")
        title = escape(f'image "{name}"; bbox 0 0 {image.width} {image.height}; ppageno {number - 1}')
        lines = "\n".join(f"   {_line(shape, number, place)}" for place, shape in enumerate(lines_of(image), 1))
        pages.append(f'  <div class="ocr_page" id="page_{number}" title="{title}">\n{lines}\n  </div>')
    body = "\n".join(pages)
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN" "http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">
 <head>
  <title>Text read by Florence-2</title>
  <meta http-equiv="Content-Type" content="text/html;charset=utf-8"/>
  <meta name="ocr-system" content="florence_onnx {__version__}"/>
  <meta name="ocr-capabilities" content="ocr_page ocr_line ocrx_word"/>
 </head>
 <body>
{body}
 </body>
</html>
"""


def _line(shape: Shape, page: int, place: int) -> str:
    box = " ".join(str(round(number)) for number in shape.bounds)
    confidence = "" if shape.score is None else f"; x_wconf {round(100 * shape.score)}"
    title, text = f"bbox {box}{confidence}", escape(xml_text(shape.text))
    return f'<span class="ocr_line" id="line_{page}_{place}" title="{title}">{text}</span>'


def alto(image: LabelledImage) -> bytes:
    """ALTO 4: a text line for each quad, with its outline, and a string for each word, which shares the line's width by letters."""
    root = ElementTree.Element("alto", {"xmlns": ALTO})
    description = ElementTree.SubElement(root, "Description")
    ElementTree.SubElement(description, "MeasurementUnit").text = "pixel"
    information = ElementTree.SubElement(description, "sourceImageInformation")
    ElementTree.SubElement(information, "fileName").text = xml_text(image.source)
    processing = ElementTree.SubElement(description, "Processing", {"ID": "processing_1"})
    software = ElementTree.SubElement(processing, "processingSoftware")
    ElementTree.SubElement(software, "softwareName").text = "florence_onnx"
    ElementTree.SubElement(software, "softwareVersion").text = __version__
    size = {"HEIGHT": str(image.height), "WIDTH": str(image.width)}
    page = ElementTree.SubElement(
        ElementTree.SubElement(root, "Layout"), "Page", {"ID": "page_1", "PHYSICAL_IMG_NR": "1", **size}
    )
    space = ElementTree.SubElement(page, "PrintSpace", {"HPOS": "0", "VPOS": "0", **size})
    for number, shape in enumerate(lines_of(image), 1):
        place = _alto_place(shape.bounds)
        block = ElementTree.SubElement(space, "TextBlock", {"ID": f"block_{number}", **place})
        line = ElementTree.SubElement(block, "TextLine", {"ID": f"line_{number}", **place})
        outline = ElementTree.SubElement(line, "Shape")
        ElementTree.SubElement(outline, "Polygon", {"POINTS": _points(shape)})
        for count, (word, bounds) in enumerate(_words(shape)):
            if count:
                ElementTree.SubElement(line, "SP")
            confidence = {} if shape.score is None else {"WC": f"{shape.score:.4f}"}
            given = {
                "ID": f"string_{number}_{count + 1}",
                "CONTENT": xml_text(word),
                **_alto_place(bounds),
                **confidence,
            }
            ElementTree.SubElement(line, "String", given)
    return xml_bytes(root)


def page_xml(image: LabelledImage) -> bytes:
    """PAGE 2019: a region with one line for each quad."""
    root = ElementTree.Element("PcGts", {"xmlns": PAGE})
    metadata = ElementTree.SubElement(root, "Metadata")
    for name, value in (("Creator", f"florence_onnx {__version__}"), ("Created", _DATE), ("LastChange", _DATE)):
        ElementTree.SubElement(metadata, name).text = value
    page = ElementTree.SubElement(
        root,
        "Page",
        {"imageFilename": xml_text(image.source), "imageWidth": str(image.width), "imageHeight": str(image.height)},
    )
    for number, shape in enumerate(lines_of(image), 1):
        region = ElementTree.SubElement(page, "TextRegion", {"id": f"region_{number}"})
        ElementTree.SubElement(region, "Coords", {"points": _points(shape)})
        line = ElementTree.SubElement(region, "TextLine", {"id": f"line_{number}"})
        ElementTree.SubElement(line, "Coords", {"points": _points(shape)})
        confidence = {} if shape.score is None else {"conf": f"{shape.score:.4f}"}
        equivalent = ElementTree.SubElement(line, "TextEquiv", confidence)
        ElementTree.SubElement(equivalent, "Unicode").text = xml_text(shape.text)
    return xml_bytes(root)


_DATE = "2026-01-01T00:00:00"
"""PAGE demands dates; a fixed one, so that the same rows give the same file."""


def _points(shape: Shape) -> str:
    return " ".join(f"{round(x)},{round(y)}" for x, y in shape.corners)


def _alto_place(bounds: tuple[float, float, float, float]) -> dict[str, str]:
    x0, y0, x1, y1 = bounds
    values = {"HPOS": x0, "VPOS": y0, "WIDTH": x1 - x0, "HEIGHT": y1 - y0}
    return {name: f"{value:.2f}" for name, value in values.items()}


def _words(shape: Shape) -> list[tuple[str, tuple[float, float, float, float]]]:
    x0, y0, x1, y1 = shape.bounds
    words, total = shape.text.split(), max(1, len(" ".join(shape.text.split())))
    found, place = [], 0
    for word in words:
        left, right = (x0 + (x1 - x0) * at / total for at in (place, place + len(word)))
        found.append((word, (left, y0, right, y1)))
        place += len(word) + 1
    return found
