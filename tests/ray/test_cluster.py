"""A batch job on a local cluster of two Ray nodes: `pytest -m cluster -n 0 tests/ray`, about two minutes.

The same rows as on one computer, whoever is killed: a worker, a node, or the job itself.
"""

from __future__ import annotations

import io
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ray = pytest.importorskip("ray", reason="pip install -e '.[ray]'")
pa = pytest.importorskip("pyarrow", reason="pip install -e '.[ray]'")
pytest.importorskip("pyarrow.parquet")
cluster_utils = pytest.importorskip("ray.cluster_utils")

from florence_onnx import BundleNotFoundError, GenerationOptions, InputError, tasks  # noqa: E402
from florence_onnx.batch.arrow import from_table  # noqa: E402
from florence_onnx.batch.job import Job, run  # noqa: E402
from florence_onnx.batch.outputs import read_rows  # noqa: E402
from florence_onnx.ray import Actors, Columns, answer  # noqa: E402
from florence_onnx.ray import run as run_on_ray  # noqa: E402
from tests.ray import cluster_job  # noqa: E402

pytestmark = pytest.mark.cluster
SAMPLES = sorted((Path(tasks.__file__).parent / "demo" / "samples").glob("*.png"))
MIB = 2**20
Rows = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """80 images in a folder, a shard and a table, 20 of them damaged."""
    root = tmp_path_factory.mktemp("sources")
    files = {f"{number:03}": _image(number) for number in range(80)}
    names = sorted(files)
    folder = root / "folder"
    folder.mkdir()
    for name in names[:40]:
        (folder / f"{name}.png").write_bytes(files[name])
    with tarfile.open(root / "shard.tar", "w") as shard:
        for name in names[40:60]:
            member = tarfile.TarInfo(f"{name}.png")
            member.size = len(files[name])
            shard.addfile(member, io.BytesIO(files[name]))
    pa.parquet.write_table(
        pa.table({"name": names[60:], "image": [{"bytes": files[name], "path": f"{name}.png"} for name in names[60:]]}),
        root / "table.parquet",
    )
    return [folder, root / "shard.tar", root / "table.parquet"]


def _image(number: int) -> bytes:
    buffer = io.BytesIO()
    with Image.open(SAMPLES[number % len(SAMPLES)]) as sample:
        sample.convert("RGB").resize((96, 90 + number)).save(buffer, "PNG")
    return buffer.getvalue()[:200] if number % 4 == 3 else buffer.getvalue()


@pytest.fixture(scope="module")
def expected(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """What one computer answers."""
    out = tmp_path_factory.mktemp("expected") / "rows.jsonl"
    run(cluster_job.job(out, sources))
    found = rows_of(out)
    assert len(found) == 160
    assert sum(row["error"] is not None for row in found.values()) == 40
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head node with three CPUs, where the jobs begin, and a second node with two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = {
            "metrics_export_port": port,
            "num_cpus": 3,
            "object_store_memory": 100 * MIB,
            "include_dashboard": False,
        }
        found = cluster_utils.Cluster(initialize_head=True, head_node_args=arguments)
        add_node(found)
        yield found
        found.shutdown()


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=2, object_store_memory=100 * MIB)


def rows_of(out: Path) -> Rows:
    """All rows but their milliseconds; none is there twice."""
    listed = [asdict(row) for row in read_rows(out)]
    counts = Counter((row["id"], row["task"]) for row in listed)
    assert {key: count for key, count in counts.items() if count > 1} == {}
    if out.is_dir():  # `read_rows` leaves repeated rows out
        assert sum(pa.parquet.read_metadata(part).num_rows for part in out.glob("part-*")) == len(listed)
    return {(row["id"], row["task"]): {**row, "milliseconds": None} for row in listed}


def actors_of(node: Any) -> list[int]:
    """Processes on a node that hold a model."""
    (raylet,) = (each.process.pid for each in node.all_processes["raylet"])
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            title = (status.parent / "cmdline").read_bytes()
        except (OSError, ValueError):  # it has ended
            continue
        if parent == raylet and b"Predictor" in title:
            found.append(int(status.parent.name))
    return found


def metrics_of(node: Any) -> list[str]:
    """The lines about rows that a node exports."""
    with urllib.request.urlopen(f"http://127.0.0.1:{node.metrics_export_port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return [line for line in lines if line.startswith("ray_florence_onnx_rows_total{")]


def num_parts(out: Path) -> int:
    return len(list(out.glob("part-*")))


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it has not come to that")


class Meanwhile(threading.Thread):
    """Does something while the job runs, and says what has failed."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._action = action
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._action()
        except BaseException as error:  # noqa: BLE001 - told by `finish`
            self.error = error

    def finish(self) -> None:
        self.join(120)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def test_a_worker_is_killed_and_a_node_removed(
    cluster: Any, sources: list[Path], expected: Rows, tmp_path: Path
) -> None:
    out = tmp_path / "rows.parquet"
    happened = []

    def harm() -> None:
        head, (other,) = cluster.head_node, cluster.worker_nodes
        wait_until(lambda: num_parts(out) >= 2)
        both = [node for node in (head, other) if actors_of(node)]
        os.kill(actors_of(both[0])[0], signal.SIGKILL)
        happened.append(f"killed an actor at {num_parts(out)} parts")
        wait_until(lambda: num_parts(out) >= 5)
        # the workers of a node end with it
        had_actor = wait_until(lambda: actors_of(other) or num_parts(out) >= 14)
        assert isinstance(had_actor, list), "no actor was ever on the node"
        cluster.remove_node(other, allow_graceful=False)
        happened.append(f"removed a node at {num_parts(out)} parts")

    harming = Meanwhile(harm)
    harming.start()
    summary = cluster_job.on_cluster(out, sources, cluster.address)
    harming.finish()
    add_node(cluster)
    print(happened, summary)
    assert len(happened) == 2
    assert rows_of(out) == expected
    assert (summary.num_rows, summary.num_errors, summary.num_done_before) == (160, 40, 0)  # type: ignore[attr-defined]


def test_the_job_is_killed_again_and_again(cluster: Any, sources: list[Path], expected: Rows, tmp_path: Path) -> None:
    out, moments = tmp_path / "rows.parquet", random.Random(15)
    command = [sys.executable, "-m", "tests.ray.cluster_job", cluster.address, str(out), *map(str, sources)]
    left = []
    for number in range(3):
        with (tmp_path / f"log-{number}").open("w") as log:
            process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=log, stderr=log)
            parts = num_parts(out)
            at = parts + moments.randint(1, 4)
            wait_until(lambda at=at, process=process: num_parts(out) >= at or process.poll() is not None)
            time.sleep(moments.random() * 0.2)  # before, in or after a file and its commit
            process.kill()
            process.wait()
        left.append(num_parts(out))
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(left, done.stdout.splitlines()[-1])
    assert rows_of(out) == expected
    again = cluster_job.on_cluster(out, sources, cluster.address)
    assert (again.num_rows, again.num_done_before) == (0, 160)  # type: ignore[attr-defined]
    assert rows_of(out) == expected


def test_the_command_line(cluster: Any, sources: list[Path], expected: Rows, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    tasks_asked = [part for task in cluster_job.TASKS for part in ("--task", task.slug)]
    engine = ["--engine", "ray", "--address", cluster.address, "--actors", "1-2"]
    options = ["--id-column", "name", "--beams", "1", "--device", "cpu", "--out", str(out)]
    command = [sys.executable, "-m", "florence_onnx", "batch", *map(str, sources), *tasks_asked, *options, *engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr[-3000:]  # there are errors
    assert "40 errors (ImageDecodeError 40)" in done.stderr
    assert rows_of(out) == expected


def test_another_job_on_its_output_is_refused(cluster: Any, sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    few = sources[1:2]
    cluster_job.on_cluster(out, few, cluster.address)
    first = rows_of(out)
    with pytest.raises(InputError, match="--restart"):
        cluster_job.on_cluster(out, few, cluster.address, beams=2)
    assert rows_of(out) == first
    cluster_job.on_cluster(out, few, cluster.address, beams=2, restart=True)
    assert rows_of(out).keys() == first.keys()
    (tmp_path / "rows.parquet.done").rename(tmp_path / "lost")
    with pytest.raises(InputError, match=r"rows.parquet.done.*missing: --restart"):
        cluster_job.on_cluster(out, few, cluster.address, beams=2)


def test_half_written_files(cluster: Any, sources: list[Path], expected: Rows, tmp_path: Path) -> None:
    """As after a death in the middle of one file, and between another and its commit."""
    out = tmp_path / "rows.parquet"
    cluster_job.on_cluster(out, sources[1:2], cluster.address)
    for number, path in enumerate(sorted((tmp_path / "rows.parquet.done").glob("part-*.parquet"))[:2]):
        path.rename(path.with_name(f"{path.stem}.pending.parquet"))
        (part,) = out.glob(f"{path.stem}-*")
        if number == 0:
            os.truncate(part, 100)
    again = cluster_job.on_cluster(out, sources[1:2], cluster.address)
    assert rows_of(out) == {key: row for key, row in expected.items() if "shard.tar" in key[0]}
    assert (again.num_rows, again.num_done_before) == (16, 24)  # type: ignore[attr-defined]


def test_errors_are_ours(cluster: Any, sources: list[Path], tmp_path: Path) -> None:
    job = cluster_job.job(tmp_path / "rows.parquet", sources)
    with pytest.raises(InputError, match=r"parquet: name it .*rows.parquet, got .*rows.jsonl"):
        run_on_ray(Job(job.sources, tmp_path / "rows.jsonl", job.question, job.loading))
    with pytest.raises(InputError, match="standard input"):
        run_on_ray(Job(("-",), job.out, job.question, job.loading))
    with pytest.raises(InputError, match=r"ray start --head"):
        run_on_ray(job, address="127.0.0.1:1")
    missing = Job(job.sources, job.out, job.question, cluster_job.Loading("/no/such/bundle"))
    with pytest.raises(BundleNotFoundError, match="/no/such/bundle"):
        run_on_ray(missing, address=cluster.address, actors=Actors(1))


def test_a_data_set_of_ones_own(cluster: Any, sources: list[Path], expected: Rows) -> None:
    ray.init(cluster.address)
    try:
        given = {"tasks": list(cluster_job.TASKS), "options": GenerationOptions(num_beams=1), "device": "cpu"}
        files = ray.data.read_binary_files(str(sources[0]), include_paths=True)
        answers = answer(files, columns=Columns(image="bytes", id="path"), actors=Actors(2), rows_per_block=8, **given)
        found = {(row["id"], row["task"]): row for row in from_table(pa.Table.from_pylist(answers.take_all()))}
        of_folder = {key: row for key, row in expected.items() if key[0].startswith(str(sources[0]))}
        # errors do not name the file: the predictor has its bytes only
        differing = {"milliseconds": None, "error": None}
        assert {key: {**row, **differing} for key, row in found.items()} == {
            key: {**row, **differing} for key, row in of_folder.items()
        }
        told = wait_until(lambda: metrics_of(cluster.head_node), 30)
        assert any('error_type="ImageDecodeError"' in line and 'task="caption"' in line for line in told)
        with pytest.raises(Exception, match=r"no column 'image'; it has bytes, path: name the columns by Columns"):
            answer(files, **given).take_all()
    finally:
        ray.shutdown()
