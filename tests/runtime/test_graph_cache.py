"""The cache of optimised graphs: same answers, never stale, and problems with it are repaired and logged."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from florence_onnx import CorruptGraphError, Florence2, InputError, tasks
from florence_onnx.bundles import bundle
from florence_onnx.runtime import cpu, engine, graph_cache
from florence_onnx.runtime.load_options import LoadOptions

DEMO = bundle.DEMO_DIRECTORY
SAMPLE = DEMO.parent / "samples" / "scene-1.png"
GRAPH = DEMO / bundle.TEXT_ENCODER


def entries(folder: Path) -> list[str]:
    """Names of everything in the cache folder, unfinished entries included."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def load(folder: Path | None, path: Path = GRAPH, **arguments: Any) -> engine.OnnxEngine:
    return engine.OnnxEngine(path, LoadOptions("cpu", graph_cache=folder or False, **arguments))


def run(loaded: engine.OnnxEngine) -> Sequence[np.ndarray[Any, Any]]:
    """Outputs of the text encoder for fixed inputs."""
    sizes = bundle.read(DEMO).sizes
    generator = np.random.default_rng(0)
    feeds = {
        "input_ids": np.arange(3, 9)[None],
        "attention_mask": np.ones((1, 6), dtype=np.int64),
        "image_features": generator.standard_normal((1, sizes.num_image_tokens, sizes.width)),
    }
    return list(loaded.run(feeds).values())


def test_answers_are_the_same_to_the_bit(tmp_path: Path) -> None:
    plain = Florence2.from_pretrained("demo", device="cpu", graph_cache=False)
    made, kept = (Florence2.from_pretrained("demo", device="cpu", graph_cache=tmp_path) for _ in range(2))
    assert len(entries(tmp_path)) == 3
    features = [model.encode(SAMPLE).image_features for model in (plain, made, kept)]
    np.testing.assert_array_equal(features[0], features[1])
    np.testing.assert_array_equal(features[0], features[2])
    answers = {model.run(tasks.OBJECT_DETECTION, SAMPLE).token_ids for model in (plain, made, kept)}
    assert len(answers) == 1


def test_the_bundle_is_never_written_to(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(DEMO, tmp_path / "bundle"))
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    Florence2.from_pretrained(copy, device="cpu", graph_cache=tmp_path / "kept")
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_an_entry_is_used_and_not_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "florence_onnx"):
        load(tmp_path)
        (name,) = entries(tmp_path)
        written = (tmp_path / name / graph_cache.GRAPH).stat().st_mtime_ns
        load(tmp_path)
    assert entries(tmp_path) == [name]
    assert (tmp_path / name / graph_cache.GRAPH).stat().st_mtime_ns == written
    assert caplog.text.count("saved to") == 1
    assert caplog.text.count(f"{bundle.TEXT_ENCODER} loaded from") == 1


@pytest.mark.parametrize("file", [graph_cache.GRAPH, graph_cache.WEIGHTS, graph_cache.FACTS])
@pytest.mark.parametrize("damage", ["missing", "shortened", "changed"])
def test_a_damaged_entry_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    if (file, damage) == (graph_cache.WEIGHTS, "changed"):
        pytest.skip("as documented: gigabytes of weights are compared by size only")
    expected = run(load(tmp_path))
    (name,) = entries(tmp_path)
    path = tmp_path / name / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "shortened" else b"\0" * len(content))
    for found, wanted in zip(run(load(tmp_path)), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert f"of {bundle.TEXT_ENCODER} is damaged and is written again" in caplog.text
    assert entries(tmp_path) == [name]
    assert path.stat().st_size == len(content)


def test_another_bundle_option_version_or_cpu_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(DEMO, tmp_path / "bundle"))
    graph = copy / bundle.TEXT_ENCODER

    def key(options: dict[str, Any] | None = None, runtime: str = "1.32.0") -> str:
        return graph_cache.key(graph, options or {}, runtime)

    same = {key(), key({"intra_op_num_threads": 7}), key({"session.force_spinning_stop": "0"})}
    assert len(same) == 1
    others = [key(runtime="1.31.0"), key({"graph_optimization_level": 1})]
    os.utime(copy / bundle.WEIGHTS)
    others.append(key())
    (copy / bundle.DESCRIPTION).write_text((copy / bundle.DESCRIPTION).read_text() + " ")
    others.append(key())
    monkeypatch.setattr(cpu, "name", lambda: "another chip")
    others.append(key())
    assert len(same | set(others)) == 6


def test_a_folder_that_is_not_writable_is_logged_and_not_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    expected = run(load(None))
    np.testing.assert_array_equal(run(load(tmp_path / "file" / "below"))[0], expected[0])
    assert f"{bundle.TEXT_ENCODER} cannot be cached" in caplog.text


def test_a_full_disk_is_logged_and_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(new: Path, entry: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph_cache, "_commit", full)
    np.testing.assert_array_equal(run(load(tmp_path))[0], run(load(None))[0])
    assert "cannot be cached: [Errno 28] No space left" in caplog.text
    assert entries(tmp_path) == []


def test_a_broken_graph_is_the_bundles_error(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(bytes(100))
    with pytest.raises(CorruptGraphError, match=r"graph\.onnx does not load"):
        load(tmp_path / "kept", tmp_path / "graph.onnx")
    assert entries(tmp_path / "kept") == []


def test_several_threads_may_write_one_entry_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load, [tmp_path] * 4))
    assert len(entries(tmp_path)) == 1
    expected = run(load(None))
    assert all(np.array_equal(run(each)[0], expected[0]) for each in loaded)


def test_the_least_recently_used_entry_is_evicted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path)
    (first,) = entries(tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / first).iterdir())
    load(tmp_path, session_options={"enable_mem_pattern": True})
    (second,) = set(entries(tmp_path)) - {first}
    for name, age in ((first, 100), (second, 200)):
        os.utime(tmp_path / name, (age, age))
    load(tmp_path)  # uses the first entry again
    monkeypatch.setattr(graph_cache, "MAX_BYTES", 2 * size + 1000)
    load(tmp_path, session_options={"enable_mem_reuse": False})
    assert first in entries(tmp_path)
    assert second not in entries(tmp_path)
    assert len(entries(tmp_path)) == 2


def test_the_folder_is_the_argument_else_the_environment_else_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default = tmp_path / "florence_onnx" / "graphs"
    monkeypatch.delenv(graph_cache.ENVIRONMENT, raising=False)
    assert graph_cache.folder(None) is None
    assert graph_cache.folder(True) == default
    for value, expected in (("", None), ("0", None), ("1", default), ("there", Path("there"))):
        monkeypatch.setenv(graph_cache.ENVIRONMENT, value)
        assert graph_cache.folder(None) == expected
    assert graph_cache.folder(False) is None
    assert graph_cache.folder(tmp_path) == tmp_path
    with pytest.raises(InputError, match="graph_cache must be a folder"):
        graph_cache.folder(3)  # type: ignore[arg-type]


def test_two_options_that_save_the_optimised_graph_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exclude each other"):
        load(tmp_path, session_options={"optimized_model_filepath": str(tmp_path / "mine.onnx")})
