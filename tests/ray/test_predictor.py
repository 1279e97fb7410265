"""The predictor and its columns, in this process: what an actor does, without a cluster."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pa = pytest.importorskip("pyarrow", reason="pip install -e '.[ray]'")

from florence_onnx import GenerationOptions, InputError, Region, UnknownTaskError, errors, tasks  # noqa: E402
from florence_onnx.batch.answering import Loading, Question, answer  # noqa: E402
from florence_onnx.batch.arrow import TYPES, from_table  # noqa: E402
from florence_onnx.batch.items import Item  # noqa: E402
from florence_onnx.commands.batch_on_ray import parse_actors  # noqa: E402
from florence_onnx.commands.main import app  # noqa: E402
from florence_onnx.ray import Actors, Columns, Predictor  # noqa: E402
from florence_onnx.ray.pipeline import _told  # noqa: E402

SAMPLES = sorted((Path(tasks.__file__).parent / "demo" / "samples").glob("*.png"))[:4]
GREEDY = GenerationOptions(num_beams=1, scores=True)
LOADING = {"device": "cpu", "session_options": {"intra_op_num_threads": 1}}
BYTES = [path.read_bytes() for path in SAMPLES]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(tasks=["caption", "<OD>"], options=GREEDY, **LOADING)


def without_time(rows: Any) -> list[dict[str, Any]]:
    return [{**row, "milliseconds": None} for row in rows]


def table(images: list[Any], **columns: list[Any]) -> pa.Table:
    return pa.table({"image": images, "id": [f"i{row}" for row in range(len(images))], **columns})


def test_rows_are_those_of_a_batch_job(predictor: Predictor) -> None:
    images = [BYTES[0], b"no image", BYTES[1], BYTES[2][:300]]
    question = Question((tasks.CAPTION, tasks.OBJECT_DETECTION), options=GREEDY)
    items = [Item(f"i{row}", f"i{row}", image) for row, image in enumerate(images)]
    expected = [asdict(row) for row in answer(items, Loading("demo", LOADING).load(), question, model_name="demo")]
    found = predictor(table(images))
    assert without_time(from_table(found)) == without_time(json.loads(json.dumps(expected)))
    assert [(field.name, str(field.type)) for field in found.schema] == [
        (name, {"float64": "double"}.get(kind, kind)) for name, kind in TYPES.items()
    ]
    assert found["error_type"].to_pylist() == [
        None,
        None,
        *["ImageDecodeError"] * 2,
        None,
        None,
        *["ImageDecodeError"] * 2,
    ]
    assert all(score > 0 for score in found["score"].to_pylist() if score is not None)
    assert any(found["score"].to_pylist())


def test_numpy_batches_and_all_forms_of_images(predictor: Predictor, tmp_path: Path) -> None:
    cells = [BYTES[0], {"bytes": BYTES[0], "path": "x.png"}, {"bytes": None, "path": str(SAMPLES[0])}, str(SAMPLES[0])]
    images = np.empty(len(cells), dtype=object)
    images[:] = cells
    found = predictor({"image": images, "id": np.arange(4)})
    assert found["id"].to_pylist() == [str(row) for row in range(4) for _ in range(2)]
    assert found["error"].to_pylist() == [None] * 8
    assert len(set(found["text"].to_pylist())) == 2  # of two tasks, the same for all forms


def test_cells_that_cannot_be_used_are_error_rows(predictor: Predictor) -> None:
    empty = [None, "", {"bytes": None, "path": None}]
    images = np.array([*empty, BYTES[0], "no/such.png"], dtype=object)
    ids = np.array(["a", "b", "c", None, "e"], dtype=object)
    found = predictor({"image": images, "id": ids})
    kinds = found["error_type"].to_pylist()[::2]
    assert kinds == ["ImageError", "ImageError", "ImageError", "ImageError", "ImageNotFoundError"]
    assert found["error"][6].as_py() == "the row has no 'id'"


def test_an_empty_batch_has_all_columns(predictor: Predictor) -> None:
    assert predictor(table([])).column_names == list(TYPES)


def test_texts_regions_and_kept_columns() -> None:
    columns = Columns(text="phrase", region="where", source="from", keep=("page", "phrase"))
    asked = [tasks.CAPTION_TO_PHRASE_GROUNDING, tasks.REGION_TO_CATEGORY]
    predictor = Predictor(
        tasks=asked, columns=columns, text="a star", region="<loc_0><loc_0><loc_999><loc_999>", **LOADING
    )
    batch = table(
        [BYTES[0]] * 4,
        phrase=["a circle", None, "a circle", "a circle"],
        where=[[1, 2, 300, 400], None, [1, 2, 3], [1, 2, 3, 4000]],
        page=[7, 8, 9, 10],
        **{"from": ["x", None, "y", "z"]},
    )
    found = predictor(batch)
    whole = Region(0, 0, 999, 999).location_tokens
    assert found["prompt"].to_pylist()[:4] == ["a circle", Region(1, 2, 300, 400).location_tokens, "a star", whole]
    assert found["error_type"].to_pylist()[:4] == [None] * 4
    assert all("region" in str(error) or "999" in str(error) for error in found["error"].to_pylist()[4:])
    assert found["page"].to_pylist() == [7, 7, 8, 8, 9, 9, 10, 10]
    assert found["source"].to_pylist() == ["x", "x", "i1", "i1", "y", "y", "z", "z"]
    assert found["phrase"].to_pylist()[2:4] == [None, None]


def test_errors_of_a_reader_keep_their_class(predictor: Predictor) -> None:
    reader = Columns(error="error")
    own = Predictor(tasks="caption", columns=reader, **LOADING)
    kinds = ["ImageTooLargeError", "FlorenceError", "annotations", None]
    failed = [None if kind is None else {"type": kind, "message": "page 3 is too large"} for kind in kinds]
    found = own(table([None, None, None, BYTES[0]], error=failed))
    assert found["error_type"].to_pylist() == ["ImageTooLargeError", "ImageError", "ImageError", None]
    assert found["error"].to_pylist()[:3] == ["page 3 is too large"] * 3


def test_wrong_data_sets_stop_the_job(predictor: Predictor) -> None:
    with pytest.raises(InputError, match=r"no column 'image'; it has bytes, path.*Columns"):
        predictor(pa.table({"bytes": [b""], "path": ["a"]}))
    with pytest.raises(InputError, match=r"encoded, got an array \(8, 8, 3\).*read_binary_files"):
        predictor({"image": np.zeros((2, 8, 8, 3), np.uint8), "id": np.arange(2)})
    with pytest.raises(InputError, match="batch_format"):
        predictor([1])


def test_wrong_arguments_are_refused_before_any_image() -> None:
    with pytest.raises(UnknownTaskError):
        Predictor(tasks="no-such-task", **LOADING)
    with pytest.raises(InputError, match="at least one task"):
        Predictor(tasks=[], **LOADING)
    with pytest.raises(InputError, match=r"needs a text.*Columns\(text"):
        Predictor(tasks="caption-to-phrase-grounding", **LOADING)
    with pytest.raises(InputError, match=r"needs a region.*Columns\(region"):
        Predictor(tasks="region-to-category", **LOADING)
    with pytest.raises(InputError, match="actors"):
        Actors((3, 2))
    with pytest.raises(errors.BundleNotFoundError):
        Predictor("/no/such/bundle", tasks="caption", **LOADING)


def test_what_goes_to_an_actor_is_pickled_small() -> None:
    sent = {"tasks": (tasks.CAPTION,), "options": GREEDY, "columns": Columns(), "region": Region(1, 2, 3, 4)}
    again = pickle.loads(pickle.dumps(sent))
    assert again == sent
    assert len(pickle.dumps(sent)) < 10_000


def test_the_command_line_has_the_engine(tmp_path: Path) -> None:
    runner = CliRunner()
    command = ["batch", str(SAMPLES[0]), "--task", "caption", "--engine", "ray", "--out"]
    refused = runner.invoke(app, [*command, str(tmp_path / "rows.jsonl")])
    assert refused.exit_code == 2
    assert "on Ray the output is parquet: name it" in refused.output
    refused = runner.invoke(app, [*command, str(tmp_path / "rows.parquet"), "--actors", "two"])
    assert refused.exit_code == 2
    assert "must be N or LEAST-MOST" in refused.output
    refused = runner.invoke(app, [*command, str(tmp_path / "rows.parquet"), "--actors", "3-2"])
    assert "actors must be at least 1" in refused.output
    assert not list(tmp_path.iterdir())
    assert parse_actors("2-8") == (2, 8)
    assert parse_actors("8") == 8


def test_errors_that_ray_keeps_as_text_only() -> None:
    text = "The actor died\nTraceback\n  raise\nflorence_onnx.errors.BundleNotFoundError: 'x' is not a directory; give\none"
    found = _told(text)
    assert type(found) is errors.BundleNotFoundError
    assert str(found) == "'x' is not a directory; give\none"
    assert _told("florence_onnx.errors.annotations: x") is None
    assert _told("ValueError: x") is None
    missing = _told("a\nflorence_onnx.errors.MissingExtraError: x is not installed; run: pip install y")
    assert type(missing) is errors.ProviderError
    assert str(missing).endswith("pip install y")
