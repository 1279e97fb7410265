"""Parsers of generated text, one for each answer grammar; their names are those of transformers.

The parsers accept any string and return what the reference returns (Microsoft's `processing_florence2.py`; transformers
does the same and truncates coordinates to integers). There are three differences:

1. An OCR label never contains `</s>`.
2. Labels are stripped of white space at both ends.
3. Labels keep non-ASCII characters.

Generated text may be anything, from a poor checkpoint or from words that someone planted in an image. The regular
expressions of the reference take quadratic time on some strings; these parsers scan from left to right in linear time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

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
"""Phrases that grounding leaves out, because they name no object; compared case-sensitively with the whole label."""

_TEXT = re.compile(r"[^<]+")
_LOCATION = re.compile(r"<loc_\d+>")
_LEADING_LOCATION = re.compile(r"^<loc_\d+>")
_LOCATIONS = re.compile(r"(?:<loc_\d+>)+")
_BOX_RUN = re.compile(r"(?:<loc_\d+>){4,}")
_POLYGON_RUN = re.compile(r"(?:<loc_\d+>|<sep>|<poly>|</poly>){4,}")
_POLYGON_LABEL_END = re.compile(r"<loc_|<poly>")
_QUAD_LENGTH = 8


def pure_text(text: str, size: Size) -> str:
    """Parses a caption or another answer without geometry.

    Args:
        text: Generated text.
        size: Unused; all parsers have the same signature.

    Returns:
        The text without `<s>` and `</s>`, stripped. Location tokens are kept: the region tasks repeat their region.
    """
    return text.replace("<s>", "").replace("</s>", "").strip()


def description_with_bboxes(text: str, size: Size) -> BoundingBoxes:
    """Parses `label<loc>x4…label<loc>x4…`; a label before several boxes belongs to each of them.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        The boxes in the order of the text. A label with a line break inside is dropped together with its boxes.
    """
    return BoundingBoxes(tuple(_labelled_boxes(remove_special_tokens(text), size)))


def phrase_grounding(text: str, size: Size) -> BoundingBoxes:
    """Parses the grammar of `description_with_bboxes` and drops the boxes of `BANNED_PHRASES`.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        The boxes in the order of the text.
    """
    boxes = _labelled_boxes(remove_special_tokens(text), size)
    return BoundingBoxes(tuple(box for box in boxes if box.label not in BANNED_PHRASES))


def bboxes(text: str, size: Size) -> BoundingBoxes:
    """Parses runs of four or more location tokens; text between them is ignored.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        The boxes in the order of the text, with empty labels.
    """
    runs = _BOX_RUN.findall(remove_special_tokens(text))
    return BoundingBoxes(tuple(box for run in runs for box in _boxes_of_run("", run, size)))


def ocr(text: str, size: Size) -> OCRBoundingBox:
    """Parses `line of text<loc>x8…`.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        Each line of text with its four corners and the axis-aligned box around them.
    """
    lines = remove_special_tokens(text).split("\n")  # a label never spans lines
    return OCRBoundingBox(tuple(quad for line in lines for quad in _quads_of_line(line, size)))


def polygons(text: str, size: Size) -> PolygonOutput:
    """Parses runs of four or more of `<loc>`, `<sep>`, `<poly>` and `</poly>`; text between them is ignored.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        One polygon for each part between separators, with an empty label (`<sep>` where one comes before the second
        location token of the run, as in the reference). A part with a single location token is a polygon without
        points.
    """
    found: list[tuple[Polygon, ...]] = []
    for run in _POLYGON_RUN.findall(remove_special_tokens(text)):
        # The pattern of the reference consumes the first token of a run before it looks for the end of the label, so
        # `<loc_1><sep><loc_2>…` has the label `<sep>`.
        label = _polygon_label("", _LEADING_LOCATION.sub("", run))
        found.extend(_instances_of_run(label, run, size))
    return _numbered(found)


def description_with_polygons(text: str, size: Size) -> PolygonOutput:
    """Parses `label<poly><loc>…<sep><loc>…</poly>…`.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        One polygon for each part between separators. A label with a line break inside is dropped together with its
        polygons.
    """
    found: list[tuple[Polygon, ...]] = []
    for head, run in _phrases(remove_special_tokens(text), _POLYGON_RUN):
        found.extend(_instances_of_run(_polygon_label(head, run), run, size))
    return _numbered(found)


def description_with_bboxes_or_polygons(text: str, size: Size) -> BoundingBoxes:
    """Parses an open-vocabulary answer: polygons if there is any `<poly>`, otherwise boxes; never both.

    Args:
        text: Generated text.
        size: (width, height) of the image in pixels.

    Returns:
        The result, with `bboxes` or `polygons` filled.
    """
    if "<poly>" in text:
        return BoundingBoxes((), description_with_polygons(text, size).polygons)
    return description_with_bboxes(text, size)


def remove_special_tokens(text: str) -> str:
    """A text without `<s>`, `</s>` and `<pad>`."""
    return text.replace("<s>", "").replace("</s>", "").replace("<pad>", "")


def _phrases(text: str, run_pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Yields each piece of text that is directly followed by a run, and the run.

    A piece contains no `<`, so the rest of a tag that is not a location token stays in front of the label (`<od>car`
    yields `od>car`), as in the reference.
    """
    # Where no run follows a piece, none follows any suffix of it either, because they end at the same character. The
    # search therefore goes on behind the whole piece, which makes it linear; a regular expression would try each
    # suffix.
    position = 0
    while head := _TEXT.search(text, position):
        run = run_pattern.match(text, head.end())
        if run:
            yield head.group(), run.group()
        position = run.end() if run else head.end()


def _label(head: str) -> str | None:
    """The stripped label, or None if there is a line break inside, for which the reference drops the phrase."""
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
    """Yields a quad for every eight adjacent location tokens with a label in front.

    These are the matches of the reference's pattern, `(.+?)` and eight location tokens, in linear time.
    """
    # The label `.+?` takes at least one character, and location tokens are characters like any other. So eight tokens
    # directly behind the last match are no quad: the first becomes the beginning of the label, and the next eight are
    # tried. For the same reason a ninth token in a row is text of the next label.
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
    """The label: the head and the run up to its first location token or `<poly>`. None if the run has neither."""
    end = _POLYGON_LABEL_END.search(run)
    return _label(head + run[: end.start()]) if end else None


def _instances_of_run(label: str | None, run: str, size: Size) -> Iterator[tuple[Polygon, ...]]:
    """Yields the outlines of each instance of a run; an instance without any is skipped, as in the reference."""
    if label is None:
        return
    for instance in _polygon_instances(run):
        # only location tokens in front of a <sep> or the end are an outline, as in the reference
        parts = tuple(
            Polygon(to_points(from_tokens(part.group()), size), label)
            for part in _LOCATIONS.finditer(instance)
            if part.end() == len(instance) or instance.startswith("<sep>", part.end())
        )
        if parts:
            yield parts


def _numbered(instances: list[tuple[Polygon, ...]]) -> PolygonOutput:
    """All outlines in order, each with the number of its instance."""
    return PolygonOutput(
        tuple(replace(part, instance=number) for number, parts in enumerate(instances) for part in parts)
    )


def _polygon_instances(run: str) -> Iterator[str]:
    """The text inside each `<poly>…</poly>`, or the whole run if it does not contain both tags."""
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


PARSERS: dict[str, Callable[[str, Size], Any]] = {
    parser.__name__: parser
    for parser in (
        pure_text,
        description_with_bboxes,
        phrase_grounding,
        bboxes,
        ocr,
        polygons,
        description_with_polygons,
        description_with_bboxes_or_polygons,
    )
}
"""All parsers by the names that Microsoft's `processing_florence2.py` gives them."""
