"""What of an answer is certain while it is still being generated: the items that no continuation of the text can change.

An item is a box, a quad box, an outline, or a word of an answer that is text. For every text T and every text that begins
with it, `settled(parser, T, size)` is the beginning of what `items_of` finds in the parsed whole.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from florence_onnx.answers import postprocess
from florence_onnx.answers.locations import Size
from florence_onnx.answers.results import (
    BoundingBox,
    BoundingBoxes,
    OCRBoundingBox,
    OCRBoundingBoxSingle,
    Polygon,
    PolygonOutput,
)

Item: TypeAlias = "BoundingBox | OCRBoundingBoxSingle | Polygon | str"
"""A word has the white space before it, so that the words joined are the answer."""
_Parser = Callable[[str, Size], Any]

_WORD = re.compile(r"\s*\S+")
_COMPLETE_WORD = re.compile(r"\s*\S+(?=\s)")
_RUN = re.compile(r"(?:<loc_\d+>|<sep>|<poly>|</poly>)+")


def items_of(results: Any) -> tuple[Item, ...]:
    """The items of a parsed answer in their order; none for what a parser of one's own returns."""
    if isinstance(results, str):
        return tuple(_WORD.findall(results))
    if isinstance(results, BoundingBoxes):
        return (*results.bboxes, *results.polygons)
    if isinstance(results, OCRBoundingBox):
        return results.quad_boxes
    return results.polygons if isinstance(results, PolygonOutput) else ()


def settled(parser: _Parser, text: str, size: Size) -> tuple[Item, ...]:
    """The items that are certain.

    Args:
        parser: One of `postprocess.PARSERS`; of another's answer nothing is certain before the end.
        text: Generated text so far, with special and location tokens.
        size: `(width, height)` of the image in pixels.
    """
    find = _BY_PARSER.get(parser)
    return () if find is None else find(parser, text, size)


def _words(parser: _Parser, text: str, size: Size) -> tuple[Item, ...]:
    """The words that white space follows."""
    # as in `postprocess.pure_text`, which removes one token after the other
    return tuple(_COMPLETE_WORD.findall(text.replace("<s>", "").replace("</s>", "").lstrip()))


def _boxes(parser: _Parser, text: str, size: Size) -> tuple[Item, ...]:
    """All that are parsed: the parsers read from left to right, and a box is complete with its last location token."""
    return items_of(parser(text, size))


def _outlines(parser: _Parser, text: str, size: Size) -> tuple[Item, ...]:
    """The outlines of runs that have ended, and in the last run those inside a closed `<poly>…</poly>`.

    Others may still change: a `<poly>` further on in the same run means that only what stands between such tags counts.
    """
    return items_of(parser(_without_open_run(postprocess.remove_special_tokens(text)), size))


def _without_open_run(text: str) -> str:
    last = next(iter(deque(_RUN.finditer(text), maxlen=1)), None)
    if last is None or _has_ended(text[last.end() :]):
        return text
    run = last.group()
    end = run.rfind("</poly>")
    is_closed = "<poly>" in run and run.find("<poly>") < end
    return text[: last.start() + end + len("</poly>")] if is_closed else text[: last.start()]


def _has_ended(rest: str) -> bool:
    """Whether a run cannot go on behind what follows it; `<lo` may become a location token, also after a special one."""
    return bool(rest) and (rest[0] != "<" or ">" in rest)


def _boxes_or_outlines(parser: _Parser, text: str, size: Size) -> tuple[Item, ...]:
    """Outlines once there is a `<poly>`. Before that nothing is certain: one `<poly>`, and the boxes do not count."""
    # of what is complete: without the `<poly>` of a run that is cut away the parser would find boxes
    return (
        tuple(item for item in _outlines(parser, text, size) if isinstance(item, Polygon)) if "<poly>" in text else ()
    )


_BY_PARSER: dict[_Parser, Callable[[_Parser, str, Size], tuple[Item, ...]]] = {
    postprocess.pure_text: _words,
    postprocess.description_with_bboxes: _boxes,
    postprocess.phrase_grounding: _boxes,
    postprocess.bboxes: _boxes,
    postprocess.ocr: _boxes,
    postprocess.polygons: _outlines,
    postprocess.description_with_polygons: _outlines,
    postprocess.description_with_bboxes_or_polygons: _boxes_or_outlines,
}
