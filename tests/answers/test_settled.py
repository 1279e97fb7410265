"""What of an answer is certain: for every beginning of a text, the beginning of the items of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from florence_onnx.answers.postprocess import PARSERS
from florence_onnx.answers.settled import items_of, settled

SIZE = (640, 480)
LOCATIONS = st.integers(0, 1001).map("<loc_{}>".format)
PIECES = st.one_of(
    LOCATIONS,
    st.lists(LOCATIONS, min_size=2, max_size=9).map("".join),
    st.sampled_from(["<sep>", "<poly>", "</poly>", "<s>", "</s>", "<pad>", "car", " a red", "the", "\n", " ", "é"]),
    st.sampled_from(["<", ">", "<lo", "c_", "<loc_", "7>", "/", "s>", "<po", "ly>", "</", "<pa", "d>", "_"]),
    st.text("<>/s_locpady 1\n", max_size=4),
)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(PIECES, max_size=14))
def test_nothing_is_taken_back(name: str, pieces: list[str]) -> None:
    """At every character, and not only at every token."""
    parser, text = PARSERS[name], "".join(pieces)
    whole = items_of(parser(text, SIZE))
    num_before = 0
    for end in range(len(text) + 1):
        found = settled(parser, text[:end], SIZE)
        assert found == whole[: len(found)]
        assert len(found) >= num_before
        num_before = len(found)


@pytest.mark.parametrize(
    ("name", "text", "certain"),
    [
        ("pure_text", "</s><s>A red car", ["A", " red"]),
        ("pure_text", "</s><s>A red car.</s>", ["A", " red"]),
        ("description_with_bboxes", "car<loc_1><loc_2><loc_3><loc_4>", 1),
        ("description_with_bboxes", "car<loc_1><loc_2><loc_3>", 0),
        ("description_with_bboxes", "car<loc_1><loc_2><loc_3><loc_4><loc_1><loc_2><loc_3><loc_4>", 2),
        ("bboxes", "<loc_1><loc_2><loc_3><loc_4><loc_5>", 1),
        ("ocr", "STOP" + "<loc_7>" * 8, 1),
        ("ocr", "STOP" + "<loc_7>" * 7, 0),
        ("polygons", "<loc_1>" * 6, 0),
        ("polygons", "<loc_1>" * 6 + "<sep>" + "<loc_2>" * 6, 0),
        ("polygons", "<loc_1>" * 6 + "x", 1),
        ("polygons", "<poly>" + "<loc_1>" * 6 + "</poly>", 1),
        ("polygons", "<poly>" + "<loc_1>" * 6 + "<sep>" + "<loc_2>" * 6 + "</poly><poly><loc_3>", 2),
        ("description_with_polygons", "cat<poly>" + "<loc_1>" * 6 + "</poly>", 1),
        ("description_with_bboxes_or_polygons", "cat<loc_1><loc_2><loc_3><loc_4>", 0),
        ("description_with_bboxes_or_polygons", "<loc_0>" * 5 + "<<poly>", 0),
        ("description_with_bboxes_or_polygons", "cat<poly>" + "<loc_1>" * 6 + "</poly>", 1),
    ],
)
def test_what_is_complete_is_certain(name: str, text: str, certain: int | list[str]) -> None:
    found = settled(PARSERS[name], text, SIZE)
    assert (list(found) if isinstance(certain, list) else len(found)) == certain


def test_a_parser_of_ones_own_is_certain_at_the_end_only() -> None:
    assert settled(lambda text, size: text, "a b c", SIZE) == ()
    assert items_of({"a": 1}) == () and items_of(" a  b ") == (" a", "  b")
