"""Batch jobs: all sources, all outputs, errors as rows, and going on after any end."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

av = pytest.importorskip("av", reason="pip install -e '.[video]'")
pyarrow = pytest.importorskip("pyarrow", reason="pip install -e '.[batch]'")
pytest.importorskip("pyarrow.parquet")
pytest.importorskip("pypdfium2", reason="pip install -e '.[pdf]'")

from florence_onnx import Florence2, GenerationOptions, InputError, Region, tasks  # noqa: E402
from florence_onnx import batch as batches  # noqa: E402
from florence_onnx.answers.results import to_dict  # noqa: E402
from florence_onnx.batch import Item, Job, Row, Summary  # noqa: E402
from florence_onnx.batch.answering import Loading, Question, answer  # noqa: E402
from florence_onnx.batch.items import in_shard  # noqa: E402
from florence_onnx.batch.job import Stop, run  # noqa: E402
from florence_onnx.batch.outputs import read_rows  # noqa: E402
from florence_onnx.batch.sources import SourceOptions, open_sources  # noqa: E402
from florence_onnx.commands.main import app  # noqa: E402

SAMPLES = sorted((Path(tasks.__file__).parent / "demo" / "samples").glob("*.png"))
GREEDY = GenerationOptions(num_beams=1)
LOADING = Loading("demo", {"device": "cpu", "session_options": {"intra_op_num_threads": 1}})
OD, CAPTION = tasks.OBJECT_DETECTION, tasks.CAPTION


@pytest.fixture(scope="module")
def model() -> Florence2:
    return LOADING.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images in folders in folders, two of them damaged, and files that are no images."""
    root = tmp_path_factory.mktemp("images")
    for number in range(18):
        path = root / f"part-{number % 3}" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.open(SAMPLES[number % len(SAMPLES)]).convert("RGB").resize((96, 90 + number)).save(path)
    (root / "part-0" / "bad.png").write_bytes(b"no image")
    (root / "part-1" / "cut.jpg").write_bytes(jpeg(SAMPLES[0])[:900])
    (root / "notes.md").write_text("no image")
    (root / "part-2" / ".hidden.png").write_bytes(b"no image")
    return root


def jpeg(path: Path) -> bytes:
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def job(out: Path, *sources: object, asked: Iterable[Any] = (CAPTION,), **more: Any) -> Job:
    question = Question(tuple(asked), options=GREEDY)
    return Job(
        tuple(map(str, sources)), out, more.pop("question", question), LOADING, workers=more.pop("workers", 1), **more
    )


def comparable(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows without their times."""
    return [asdict(replace(row, milliseconds=0.0)) for row in rows]


def without_scores(answer: Any) -> Any:
    """An answer, each of whose boxes had a score."""
    if isinstance(answer, str):
        return answer
    assert all(each["score"] > 0 for part in answer.values() for each in part)
    assert all(len(each["quad"]) == 4 for each in answer.get("quad_boxes", ()))
    extra = {"score", "quad"}
    return {name: [{key: each[key] for key in each.keys() - extra} for each in part] for name, part in answer.items()}


def items(*names: object, **options: Any) -> list[Item]:
    return [item for source in open_sources(list(map(str, names)), SourceOptions(**options)) for item in source]


# -------------------------------------------------------------------------------------------------------------- answers


def test_rows_are_the_answers_of_run(model: Florence2) -> None:
    options = GenerationOptions(num_beams=1, scores=True)
    asked = [OD, CAPTION, tasks.OCR_WITH_REGION, tasks.OPEN_VOCABULARY_DETECTION, tasks.REGION_TO_CATEGORY]
    region = Region(217, 475, 377, 648)
    given = [Item(str(path), str(path), str(path)) for path in SAMPLES[:3]]
    question = Question(tuple(asked), "red circle", region, options)
    found = list(answer(given, model, question, model_name="demo"))
    assert [row.key for row in found] == [(item.id, task.slug) for item in given for task in asked]
    for row in found:
        task = tasks.get(row.task)
        expected = model.run(
            task,
            row.source,
            text_input="red circle" if task.takes_text else None,
            region=region if task.takes_region else None,
            options=options,
        )
        assert without_scores(row.answer) == to_dict(expected.results)
        assert (row.width, row.height) == expected.source_image.size
        assert row.error is None and row.truncated is False and row.milliseconds > 0 and row.model == "demo"
        takes_region = region.location_tokens if task.takes_region else None
        assert row.prompt == ("red circle" if task.takes_text else takes_region)
    caption, lines = found[1], found[2]
    assert caption.text == caption.answer and 0 < (caption.score or 0) <= 1
    assert lines.text == "ROCKET" and found[0].text == "green circle, red circle, yellow star"


def test_an_item_has_its_own_text_and_region(model: Florence2) -> None:
    given = [
        Item("a", "a", str(SAMPLES[0]), "green circle", Region(0, 0, 999, 999)),
        Item("b", "b", str(SAMPLES[0])),
    ]
    question = Question(
        (tasks.OPEN_VOCABULARY_DETECTION, tasks.REGION_TO_CATEGORY), "yellow star", Region(1, 1, 9, 9), GREEDY
    )
    found = {row.key: row.prompt for row in answer(given, model, question)}
    assert list(found.values()) == [
        "green circle",
        "<loc_0><loc_0><loc_999><loc_999>",
        "yellow star",
        "<loc_1><loc_1><loc_9><loc_9>",
    ]


def test_an_iterator_is_read_no_further_than_two_chunks(model: Florence2) -> None:
    read: list[int] = []

    def given() -> Any:
        for number in range(100):
            read.append(number)
            yield Item(str(number), "x", str(SAMPLES[0]))

    found = answer(given(), model, Question((CAPTION,), options=GREEDY))
    next(found)
    assert len(read) <= 24
    with pytest.raises(InputError):
        next(answer(given(), model, Question((CAPTION,), options=GenerationOptions(num_beams=0))))


def test_several_processes_give_the_same_rows_in_the_same_order(folder: Path, tmp_path: Path) -> None:
    asked = (CAPTION, OD)
    one = run(job(tmp_path / "one.jsonl", folder, asked=asked))
    two = run(job(tmp_path / "two.jsonl", folder, asked=asked, workers=2))
    assert (one.num_rows, one.num_errors) == (two.num_rows, two.num_errors) == (40, 4)
    first, second = (comparable(read_rows(tmp_path / f"{name}.jsonl")) for name in ("one", "two"))
    assert first == second
    assert [row["error_type"] for row in first if row["error"]] == ["ImageDecodeError"] * 4


# -------------------------------------------------------------------------------------------------------------- sources


def test_folders_globs_and_lists(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(path) for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".jpg") and path.name[0] != "."]
    assert [item.id for item in items(folder)] == names and len(names) == 20
    matched = [name for name in names if "part-2" not in name and "jpg" not in name]
    assert [item.id for item in items(f"{folder}/part-[01]/*.png")] == matched
    listed = tmp_path / "list.txt"
    listed.write_text("# a comment\n" + "\n".join(names) + "\n\n  https://example.com/a.jpg?x=1 \n", encoding="utf-8")
    found = items(listed)
    assert [item.id for item in found] == [*names, "https://example.com/a.jpg?x=1"]
    assert found[-1].extension == ".jpg" and found[-1].encoded is None and found[0].encoded
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(names[:3])))
    assert [item.id for item in items("-")] == names[:3]
    assert [source.total for source in open_sources([str(folder), str(listed), "-"])] == [20, 21, None]


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_shards_of_webdataset(tmp_path: Path) -> None:
    image = jpeg(SAMPLES[0])
    shard = write_shard(
        tmp_path / "a.tar",
        {
            "dir/0": {"jpg": image, "txt": b" a red circle ", "json": b'{"what": "green"}'},
            "dir/1": {"json": b'{"what": "blue"}', "PNG": SAMPLES[1].read_bytes()},
            "dir/2": {"txt": b"no image"},
            "dir/3": {"jpg": b"damaged", "json": b"[]"},
            "dir/4": {"seg.jpg": image, "json": b"{"},
        },
    )
    found = items(shard)
    assert [item.id for item in found] == [f"{shard}#dir/{n}" for n in range(5)]
    assert found[0].image == image and found[0].source.endswith("#dir/0.jpg") and found[1].extension == ".png"
    assert "no image" in str(found[2].image)
    assert [item.text for item in items(shard, text_column="txt")][:2] == ["a red circle", "{}"]
    texts = items(shard, text_column="what")
    assert [item.text for item in texts[:2]] == ["green", "blue"]
    assert "no text 'what'" in str(texts[3].image) and "no readable text" in str(texts[4].image)
    whole = shard.read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"damaged") + 3])
    cut = items(tmp_path / "cut.tar")
    assert [item.id for item in cut][:3] == [f"{tmp_path}/cut.tar#dir/{n}" for n in range(3)]
    assert "cannot be read" in str(cut[-1].image)
    (tmp_path / "none.tar").write_bytes(b"no archive")
    assert "cannot be read" in str(items(tmp_path / "none.tar")[0].image)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_tables(tmp_path: Path, kind: str) -> None:
    image = SAMPLES[0].read_bytes()
    shutil.copy(SAMPLES[1], tmp_path / "b.png")
    values: list[Any] = [
        {"bytes": image, "path": "a.png"},
        {"bytes": None, "path": "b.png"},
        None,
        {"bytes": b"", "path": None},
    ]
    table = pyarrow.table(
        {
            "id": ["w", "x", "y", "z"],
            "image": pyarrow.array(values, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            "what": ["a", None, "c", "d"],
            "where": ["<loc_1><loc_2><loc_3><loc_4>", None, None, "nowhere"],
        }
    )
    path = tmp_path / ("t.parquet" if kind == "parquet" else "t.arrow")
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    found = items(path)
    assert [item.id for item in found] == [f"{path}#row={n}" for n in range(4)]
    assert found[0].image == image and found[1].image == str(tmp_path / "b.png")
    assert "must be a path" in str(found[2].image) and "must be a path" in str(found[3].image)
    named = items(path, image_column="image", text_column="what", region_column="where", id_column="id")
    assert [item.id for item in named] == ["w", "x", "y", "z"]
    assert named[0].text == "a" and named[0].region == Region(1, 2, 3, 4) and named[1].text is None
    for options, said in (({"image_column": "no"}, "no column 'no'"), ({"text_column": "no"}, "no column 'no'")):
        with pytest.raises(InputError, match=said):
            items(path, **options)


def test_tables_of_paths_bytes_and_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"jpg": [jpeg(SAMPLES[0])], "n": [1]}), path)
    assert items(path)[0].image == jpeg(SAMPLES[0])
    pyarrow.parquet.write_table(pyarrow.table({"path": ["https://example.com/x.png"]}), path)
    assert items(path)[0].image == "https://example.com/x.png"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), path)
    with pytest.raises(InputError, match="no column of images"):
        items(path)
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(InputError, match="cannot be read as a table"):
        items(path)


def write_video(path: Path, colours: list[int], rate: int = 10, each: int = 10) -> Path:
    """Scenes of one grey each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for colour in colours:
            for _ in range(each):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), colour, dtype=np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_videos(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", [10, 120, 240])
    found = items(path, fps=2.0)
    assert [item.id for item in found] == [f"{path}#t={n / 2:.3f}" for n in range(6)]
    assert isinstance(found[0].image, Image.Image) and found[0].image.size == (64, 48)
    greys = [int(np.asarray(item.image).mean()) for item in items(path, scenes=True)]
    assert len(greys) == 3 and np.abs(np.array(greys) - [10, 120, 240]).max() < 12
    assert "pixels, more than" in str(items(path, max_pixels=100)[0].image)
    content = path.read_bytes()
    (tmp_path / "none.mp4").write_bytes(content[:200])
    assert "cannot be read" in str(items(tmp_path / "none.mp4")[-1].image)
    for fps in (0, -1, float("nan")):
        with pytest.raises(InputError, match="fps"):
            items(path, fps=fps)


def test_pages_of_documents(tmp_path: Path) -> None:
    path = tmp_path / "d.pdf"
    pages = [Image.open(sample).convert("RGB").resize((200, 150)) for sample in SAMPLES[:3]]
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=100)
    found = items(path, dpi=100)
    assert [item.id for item in found] == [f"{path}#page={n}" for n in (1, 2, 3)]
    assert all(isinstance(item.image, Image.Image) and item.image.size == (200, 150) for item in found)
    assert [source.total for source in open_sources([str(path)])] == [3]
    assert "give a lower --dpi" in str(items(path, dpi=100, max_pixels=1000)[0].image)
    (tmp_path / "none.pdf").write_bytes(b"%PDF-1.4 damaged")
    assert "cannot be read" in str(items(tmp_path / "none.pdf")[0].image)
    with pytest.raises(InputError, match="dpi"):
        items(path, dpi=1)


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, said in (
        (tmp_path / "nowhere.png", "does not exist"),
        (tmp_path / "empty", "no images"),
        (f"{tmp_path}/*.jpg", "matches no file"),
        ("x" * 5000, "is no path|does not exist"),
    ):
        with pytest.raises(InputError, match=said):
            items(name)
    with pytest.raises(InputError, match="at least one source"):
        open_sources([])


# -------------------------------------------------------------------------------------------------------------- outputs

FORMS: dict[str, dict[str, Any]] = {
    "rows.jsonl": {},
    "rows.parquet": {"shard_rows": 7},
    "shards": {"form": "webdataset", "shard_rows": 7},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_every_row(folder: Path, tmp_path: Path, name: str) -> None:
    run(job(tmp_path / "expected.jsonl", folder, asked=(CAPTION, OD)))
    out = tmp_path / name
    summary = run(job(out, folder, asked=(CAPTION, OD), **FORMS[name]))
    assert (summary.num_rows, summary.num_errors, summary.errors) == (40, 4, {"ImageDecodeError": 4})
    assert comparable(read_rows(out)) == comparable(read_rows(tmp_path / "expected.jsonl"))
    if name != "rows.jsonl":
        files = sorted(path.name for path in out.iterdir())
        assert len(files) == 6 and not any(file.startswith("_") or file.endswith((".part", ".tmp")) for file in files)
    again = run(job(out, folder, asked=(CAPTION, OD), **FORMS[name]))
    assert (again.num_rows, again.num_done_before) == (0, 40)


def test_a_shard_is_read_back_as_a_source(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    run(job(out, *SAMPLES, form="webdataset"))
    (shard,) = out.glob("*.tar")
    found = items(shard, text_column="txt")
    assert [item.image for item in found] == [path.read_bytes() for path in SAMPLES]
    assert [item.text for item in found] == [row.text for row in read_rows(out)]


def test_text_files_beside_images(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "images"
    shutil.copytree(folder, copy)
    out = tmp_path / "rows.jsonl"
    run(job(out, copy, txt=True))
    found = [row for row in read_rows(out) if row.error is None]
    assert len(found) == 18 == len(list(copy.rglob("*.txt")))
    assert all(Path(row.source).with_suffix(".txt").read_text() == f"{row.text}\n" for row in found)
    with pytest.raises(InputError, match="would both be"):
        twins = [tmp_path / name / "a.png" for name in ("x", "y")]
        for twin in twins:
            twin.parent.mkdir()
            shutil.copy(SAMPLES[0], twin)
        run(job(tmp_path / "other.jsonl", *twins, txt=True, txt_dir=tmp_path / "texts"))
    with pytest.raises(InputError, match="one task"):
        run(job(tmp_path / "third.jsonl", copy, asked=(CAPTION, OD), txt=True))


# ---------------------------------------------------------------------------------------------------- after any end


@pytest.mark.parametrize("name", FORMS)
def test_a_half_written_file_is_repaired(folder: Path, tmp_path: Path, name: str) -> None:
    """Its last file cut anywhere: what is complete stays, the rest is answered again, and nothing is there twice."""
    whole = tmp_path / f"whole-{name}"
    run(job(whole, folder, asked=(OD,), **{**FORMS[name], "shard_rows": 1000}))
    expected = comparable(read_rows(whole))
    rng = random.Random(1)
    state = (tmp_path / f"whole-{name}.job.json").read_bytes()
    for turn in range(6):
        out = tmp_path / f"{turn}-{name}"
        (tmp_path / f"{turn}-{name}.job.json").write_bytes(state)
        if name == "rows.jsonl":
            content = whole.read_bytes()
            out.write_bytes(content[: rng.randrange(len(content))])
        elif name == "shards":
            out.mkdir()
            content = (whole / "shard-00000.tar").read_bytes()[: -2 * tarfile.BLOCKSIZE]
            (out / "shard-00000.tar.part").write_bytes(content[: rng.randrange(len(content))])
        else:
            out.mkdir()
            lines = [json.dumps(row) for row in expected]
            content = ("\n".join(lines) + "\n").encode()
            (out / "_rows.jsonl").write_bytes(content[: rng.randrange(len(content))])
            (out / "part-00000.tmp").write_bytes(b"half")
        summary = run(job(out, folder, asked=(OD,), **{**FORMS[name], "shard_rows": 1000}))
        assert summary.num_rows + summary.num_done_before == 20
        assert comparable(read_rows(out)) == expected


def test_a_part_whose_journal_was_not_cleared(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    run(job(out, folder, shard_rows=1000))
    expected = comparable(read_rows(out))
    (out / "_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in expected))
    assert comparable(read_rows(out)) == expected
    assert run(job(out, folder, shard_rows=1000)).num_rows == 0
    assert comparable(read_rows(out)) == expected


def command(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "florence_onnx", "batch", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def number_of_rows(out: Path) -> int:
    try:
        return sum(1 for _ in read_rows(out))
    except InputError:
        return 0


@pytest.mark.parametrize(("name", "workers"), [("rows.jsonl", 2), ("rows.parquet", 1), ("shards", 1)])
def test_killed_and_started_again(folder: Path, tmp_path: Path, name: str, workers: int) -> None:
    """`kill -9` twice in a job of many files of three rows; then every row is there once."""
    images = tmp_path / "images"
    for turn in range(4):
        shutil.copytree(folder, images / str(turn))
    out = tmp_path / name
    given = [
        images,
        "--task",
        "object-detection",
        "--out",
        out,
        "--shard-rows",
        3,
        "--workers",
        workers,
        "--beams",
        1,
        "--device",
        "cpu",
    ]
    given += ["--form", "webdataset"] if name == "shards" else []
    for least in (9, 30):
        process = command(*given)
        while number_of_rows(out) < least and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "killed while it was working"
    last = command(*given)
    said = last.communicate()[1]
    assert last.returncode == 1, "damaged images are rows with an error"
    assert "were there already" in said and "errors (ImageDecodeError" in said
    expected = tmp_path / "expected.jsonl"
    run(job(expected, images, asked=(OD,)))
    assert sorted(map(str, comparable(read_rows(out)))) == sorted(map(str, comparable(read_rows(expected))))


def test_control_c_finishes_what_is_in_flight(folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for turn in range(10):
        shutil.copytree(folder, images / str(turn))
    out = tmp_path / "rows.jsonl"
    given = [images, "--task", "object-detection", "--out", out, "--workers", 2, "--beams", 1, "--device", "cpu"]
    process = command(*given)
    while number_of_rows(out) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "stopping" in said and "the same command goes on" in said
    assert 5 <= number_of_rows(out) < 200
    assert out.read_bytes().endswith(b"\n")


def test_a_stop_from_outside(folder: Path, tmp_path: Path) -> None:
    stop = Stop()

    def on_row(row: Row, summary: Summary) -> None:
        if summary.num_rows == 3:
            stop.begin()

    out = tmp_path / "rows.jsonl"
    summary = run(job(out, folder), on_row=on_row, stop=stop)
    assert summary.is_stopped and 3 <= summary.num_rows < 20
    rest = run(job(out, folder))
    assert not rest.is_stopped and rest.num_rows + summary.num_rows == 20


def test_a_second_run_on_one_output_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"

    def on_row(row: Row, summary: Summary) -> None:
        if summary.num_rows == 1:
            other = command(folder, "--task", "caption", "--out", out, "--device", "cpu")
            assert "another run writes to" in " ".join(other.communicate()[1].split())
            assert other.returncode == 2

    assert run(job(out, folder), on_row=on_row).num_rows == 20


CHANGES: dict[str, Callable[[Job], Job]] = {
    "tasks": lambda old: replace(old, question=replace(old.question, tasks=(OD,))),
    "options": lambda old: replace(old, question=replace(old.question, options=GenerationOptions(num_beams=2))),
    "text": lambda old: replace(old, question=replace(old.question, text="a")),
    "model": lambda old: replace(old, loading=Loading("another", LOADING.arguments)),
    "loading": lambda old: replace(old, loading=Loading("demo", {**LOADING.arguments, "fit": "pad"})),
    "sources": lambda old: replace(old, source_options=SourceOptions(dpi=99)),
    "shard": lambda old: replace(old, shard=(1, 2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_job_on_one_output_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "rows.jsonl"
    old = job(out, folder / "part-0")
    run(old)
    content = out.read_bytes()
    with pytest.raises(InputError, match=rf"begun with {name} .*--restart"):
        run(CHANGES[name](old))
    assert out.read_bytes() == content
    assert run(job(out, folder / "part-0", folder / "part-1")).num_rows == 7, "more sources are fine"
    if name in ("tasks", "sources"):
        assert run(replace(CHANGES[name](old), restart=True)).num_rows == 7


def test_what_is_no_output_is_left_alone(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "notes.jsonl"
    mine.write_text("mine\n")
    with pytest.raises(InputError, match="not of a batch job"):
        run(job(mine, folder))
    assert mine.read_text() == "mine\n"
    for name, more in (
        ("rows.csv", {}),
        ("rows", {}),
        ("rows.jsonl", {"form": "xml"}),
        ("rows.jsonl", {"shard_rows": 0}),
    ):
        with pytest.raises(InputError):
            run(job(tmp_path / name, folder, **more))
    with pytest.raises(InputError, match="at least one task"):
        run(job(tmp_path / "a.jsonl", folder, asked=()))
    out = tmp_path / "b.jsonl"
    run(job(out, SAMPLES[0]))
    out.write_text("no json\n" + out.read_text())
    with pytest.raises(InputError, match="line 1, is no row"):
        run(job(out, *SAMPLES[:2]))


def test_parts_of_the_images(folder: Path, tmp_path: Path) -> None:
    names = [f"image-{number}" for number in range(2000)]
    counts = [sum(in_shard(name, (number, 5)) for name in names) for number in range(1, 6)]
    assert sum(counts) == 2000 and min(counts) > 330
    rows = [tmp_path / f"{number}.jsonl" for number in (1, 2, 3)]
    for number, out in enumerate(rows, 1):
        run(job(out, folder, shard=(number, 3)))
    found = [row.id for out in rows for row in read_rows(out)]
    assert sorted(found) == sorted(item.id for item in items(folder))
    for wrong in ((0, 3), (4, 3), (1, 0)):
        with pytest.raises(InputError, match="shard"):
            run(job(tmp_path / "x.jsonl", folder, shard=wrong))


@pytest.mark.parametrize("name", FORMS)
def test_a_name_that_is_no_utf_8(tmp_path: Path, name: str) -> None:
    """As of files that were unpacked with another encoding: its row is written, and found again."""
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(SAMPLES[0], os.fsencode(folder) + b"/caf\xe9.png")
    (folder / "ok.png").write_bytes(b"no image")
    out = tmp_path / name
    assert run(job(out, folder, **FORMS[name])).num_rows == 2
    first, second = sorted(read_rows(out), key=lambda row: row.id)
    assert first.id == f"{folder}/caf\\udce9.png" and first.error is None and second.error is not None
    assert run(job(out, folder, **FORMS[name])).num_rows == 0


def test_the_rows_of_a_cluster_are_not_gone_on_with_here(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    run(job(out, folder / "part-0"))
    state = tmp_path / "rows.parquet.job.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "engine": "ray"}))
    with pytest.raises(InputError, match=r"begun with engine 'ray', this is engine 'local'"):
        run(job(out, folder / "part-0"))


def test_an_image_that_comes_twice_is_one_row(tmp_path: Path) -> None:
    summary = run(job(tmp_path / "rows.jsonl", SAMPLES[0], SAMPLES[0].parent, SAMPLES[0]))
    assert (summary.num_rows, summary.num_repeated) == (8, 2)


# ---------------------------------------------------------------------------------------------------------- the command


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["batch", *map(str, arguments), "--device", "cpu"])


def test_the_command_says_what_it_did(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    found = call(
        folder,
        "--task",
        "caption",
        "--task",
        "object-detection",
        "--out",
        out,
        "--scores",
        "--beams",
        1,
        "--workers",
        1,
    )
    assert found.exit_code == 1
    said = " ".join(found.stderr.split())
    assert "40 rows in" in said and "4 errors (ImageDecodeError 4)" in said
    assert all((row.score is None) == (row.error is not None or row.answer == {"bboxes": []}) for row in read_rows(out))
    again = call(folder, "--task", "caption", "--task", "object-detection", "--out", out, "--scores", "--beams", 1)
    assert (
        again.exit_code == 0
        and "0 rows in" in again.stderr
        and "40 were there already" in " ".join(again.stderr.split())
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "open-vocabulary-detection"], "needs --text or --text-column"),
        (["--task", "region-to-ocr"], "needs --region or --region-column"),
        (["--task", "nothing"], "nothing"),
        (["--task", "caption", "--engine", "spark"], "must be one of local, ray"),
        (["--task", "caption", "--shard", "0/3"], "shard must be"),
        (["--task", "caption", "--shard", "x"], "must be I/N"),
        (["--task", "caption", "--fps", "0", "--out", "v"], "--out must end with"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: list[str], said: str) -> None:
    found = call(SAMPLES[0], "--out", tmp_path / "rows.jsonl", *arguments)
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.replace("│", " ").split())
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_package_has_what_its_users_need(model: Florence2, tmp_path: Path) -> None:
    given = (Item(path.name, path.name, str(path)) for path in SAMPLES[:2])
    found = list(batches.answer(given, model, Question((CAPTION,))))
    assert [row.id for row in found] == ["scene-1.png", "scene-2.png"]
