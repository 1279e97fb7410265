"""Generated text to results: one parser per answer grammar, named as transformers names them.

The parsers accept every string and answer what the reference answers, with float32 coordinates (the reference in
transformers truncates them to integers), apart from three differences:

1. `</s>` never leaks into an OCR label.
2. Labels are stripped of surrounding white space.
3. Labels keep characters beyond ASCII.

Generated text can be anything (an odd checkpoint, words in an image that someone planted), so the grammars are walked
from left to right in linear time where the obvious regular expression would be quadratic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from florence_onnx.answers.locations import Size, from_tokens, to_boxes, to_points
from florence_onnx.answers.results import (
    BoundingBox,
    BoundingBoxes,
    OCRBoundingBox,
    OCRBoundingBoxSingle,
    Polygon,
    PolygonOutput,
)

# fmt: off
BANNED_PHRASES = frozenset({
    "it", "I", "me", "mine", "you", "your", "yours", "he", "him", "his", "she", "her", "hers", "they", "them", "their",
    "theirs", "one", "oneself", "we", "us", "our", "ours", "its", "myself", "yourself", "himself", "herself", "itself",
    "ourselves", "yourselves", "themselves", "this", "that", "these", "those", "who", "whom", "whose", "which", "what",
    "all", "another", "any", "anybody", "anyone", "anything", "each", "everybody", "everyone", "everything", "few",
    "many", "nobody", "none", "several", "some", "somebody", "someone", "something", "each other", "one another",
    "the image", "image", "images", "the", "a", "an", "a group", "other objects", "lots", "a set",
})
# fmt: on
"""Phrases that grounding leaves out because they name nothing; compared exactly, upper and lower case apart."""

_TEXT = re.compile(r"[^<]+")
_LOCATION = re.compile(r"<loc_\d+>")
_LEADING_LOCATION = re.compile(r"^<loc_\d+>")
_LOCATIONS = re.compile(r"(?:<loc_\d+>)+")
_BOX_RUN = re.compile(r"(?:<loc_\d+>){4,}")
_POLYGON_RUN = re.compile(r"(?:<loc_\d+>|<sep>|<poly>|</poly>){4,}")
_POLYGON_LABEL_END = re.compile(r"<loc_|<poly>")
_QUAD_LENGTH = 8


def pure_text(text: str, size: Size) -> str:
    """Reads a caption or another plain answer.

    Args:
        text: Generated text.
        size: Not used; all parsers are called alike.

    Returns:
        The text without `<s>` and `</s>`, stripped. Location tokens stay: the region tasks echo their region.
    """
    return text.replace("<s>", "").replace("</s>", "").strip()


def description_with_bboxes(text: str, size: Size) -> BoundingBoxes:
    """Reads `label<loc>x4…label<loc>x4…`; a label before several boxes belongs to each of them.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        The boxes in the order of the text. A label with a line break inside is dropped with its boxes.
    """
    return BoundingBoxes(tuple(_labelled_boxes(_remove_special_tokens(text), size)))


def phrase_grounding(text: str, size: Size) -> BoundingBoxes:
    """Reads what `description_with_bboxes` reads, without phrases that name nothing (`BANNED_PHRASES`).

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        The boxes in the order of the text.
    """
    boxes = _labelled_boxes(_remove_special_tokens(text), size)
    return BoundingBoxes(tuple(box for box in boxes if box.label not in BANNED_PHRASES))


def bboxes(text: str, size: Size) -> BoundingBoxes:
    """Reads runs of four or more locations; text between them is passed over.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        The boxes in the order of the text, with empty labels.
    """
    runs = _BOX_RUN.findall(_remove_special_tokens(text))
    return BoundingBoxes(tuple(box for run in runs for box in _boxes_of_run("", run, size)))


def ocr(text: str, size: Size) -> OCRBoundingBox:
    """Reads `line of text<loc>x8…`.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        Each line of text with its four corners and the upright box around them.
    """
    lines = _remove_special_tokens(text).split("\n")  # a label never spans lines
    return OCRBoundingBox(tuple(quad for line in lines for quad in _quads_of_line(line, size)))


def polygons(text: str, size: Size) -> PolygonOutput:
    """Reads runs of four or more locations, `<sep>`, `<poly>` and `</poly>`; text between them is passed over.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        One polygon for each part, with empty labels (a run that begins with `<sep>` has that as its label, as in the
        reference). A part of a single coordinate gives a polygon without points.
    """
    found: list[Polygon] = []
    for run in _POLYGON_RUN.findall(_remove_special_tokens(text)):
        # the first location never ends the label, so `<loc_1><sep>…` is labelled `<sep>`
        label = _polygon_label("", _LEADING_LOCATION.sub("", run))
        found.extend(_polygons_of_run(label, run, size))
    return PolygonOutput(tuple(found))


def description_with_polygons(text: str, size: Size) -> PolygonOutput:
    """Reads `label<poly><loc>…<sep><loc>…</poly>…`.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        One polygon for each part, labelled. A label with a line break inside is dropped with its polygons.
    """
    found: list[Polygon] = []
    for head, run in _phrases(_remove_special_tokens(text), _POLYGON_RUN):
        found.extend(_polygons_of_run(_polygon_label(head, run), run, size))
    return PolygonOutput(tuple(found))


def description_with_bboxes_or_polygons(text: str, size: Size) -> BoundingBoxes:
    """Reads an open-vocabulary answer: polygons when there is a `<poly>` anywhere, else boxes, never both.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        The answer with either `bboxes` or `polygons` filled.
    """
    if "<poly>" in text:
        return BoundingBoxes((), description_with_polygons(text, size).polygons)
    return description_with_bboxes(text, size)


def _remove_special_tokens(text: str) -> str:
    return text.replace("<s>", "").replace("</s>", "").replace("<pad>", "")


def _phrases(text: str, run_pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Yields each piece of text that a run follows directly, with that run.

    A piece starts after the last `<` before it, so the tail of an unread tag stays in front of the label (`<od>car`
    gives `od>car`), as in the reference. If no run follows a piece, then none follows a part of it: one step per piece.
    """
    position = 0
    while head := _TEXT.search(text, position):
        run = run_pattern.match(text, head.end())
        if run:
            yield head.group(), run.group()
        position = run.end() if run else head.end()


def _label(head: str) -> str | None:
    """The label of a phrase, None where a line break inside forbids it."""
    label = head.lstrip()
    return None if "\n" in label else label.rstrip()


def _labelled_boxes(text: str, size: Size) -> Iterator[BoundingBox]:
    for head, run in _phrases(text, _BOX_RUN):
        label = _label(head)
        if label is not None:
            yield from _boxes_of_run(label, run, size)


def _boxes_of_run(label: str, run: str, size: Size) -> Iterator[BoundingBox]:
    for x1, y1, x2, y2 in to_boxes(from_tokens(run), size):
        yield BoundingBox(x=x1, y=y1, w=x2 - x1, h=y2 - y1, label=label)


def _quads_of_line(line: str, size: Size) -> Iterator[OCRBoundingBoxSingle]:
    """Yields a quad for each eight locations in a row that have at least one character in front.

    The ninth location of a run is text of the next label, and so is a quad that has nothing in front of it.
    """
    tokens = list(_LOCATION.finditer(line))
    position = index = 0
    while index + _QUAD_LENGTH <= len(tokens):
        group = tokens[index : index + _QUAD_LENGTH]
        if group[0].start() > position and _are_adjacent(group):
            yield _quad(line[position : group[0].start()], line[group[0].start() : group[-1].end()], size)
            position, index = group[-1].end(), index + _QUAD_LENGTH
        else:
            index += 1


def _are_adjacent(tokens: list[re.Match[str]]) -> bool:
    return all(left.end() == right.start() for left, right in pairwise(tokens))


def _quad(label: str, run: str, size: Size) -> OCRBoundingBoxSingle:
    corners = to_points(from_tokens(run), size)
    left, right = min(point.x for point in corners), max(point.x for point in corners)
    top, bottom = min(point.y for point in corners), max(point.y for point in corners)
    return OCRBoundingBoxSingle(left, top, right - left, bottom - top, label.strip(), quad=corners)


def _polygon_label(head: str, run: str) -> str | None:
    """Everything up to the first location or `<poly>` is label; without any of them there is no phrase."""
    end = _POLYGON_LABEL_END.search(run)
    return _label(head + run[: end.start()]) if end else None


def _polygons_of_run(label: str | None, run: str, size: Size) -> Iterator[Polygon]:
    if label is None:
        return
    for instance in _polygon_instances(run):
        for part in _LOCATIONS.finditer(instance):
            # locations that something other than <sep> or the end follows are no outline
            if part.end() == len(instance) or instance.startswith("<sep>", part.end()):
                yield Polygon(to_points(from_tokens(part.group()), size), label)


def _polygon_instances(run: str) -> Iterator[str]:
    """The insides of `<poly>…</poly>`, or all of the run where there is no such pair."""
    if "<poly>" not in run or "</poly>" not in run:
        yield run
        return
    start = run.find("<poly>")
    while start >= 0:
        end = run.find("</poly>", start)
        if end < 0:
            return
        yield run[start + len("<poly>") : end]
        start = run.find("<poly>", end)
