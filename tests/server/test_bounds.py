"""What a server keeps for its clients: bounds that one client cannot use up, full disks, killed servers."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="pip install -e '.[test]'")
for needed in ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger", "filelock"):
    pytest.importorskip(needed, reason="pip install -e '.[serve]'")

from florence_onnx import tasks  # noqa: E402
from florence_onnx.fal.contract import Arguments  # noqa: E402
from florence_onnx.fal.jobs import Answer, Job  # noqa: E402
from florence_onnx.fal.problems import RequestError  # noqa: E402
from florence_onnx.model import Florence2  # noqa: E402
from florence_onnx.server.context import ServerContext  # noqa: E402
from florence_onnx.server.fair_store import FairStore  # noqa: E402
from florence_onnx.server.file_store import FileStore, safe_name  # noqa: E402
from florence_onnx.server.responses import owner_of  # noqa: E402
from florence_onnx.server.results_store import ResultsStore  # noqa: E402
from florence_onnx.server.settings import ServerSettings  # noqa: E402
from tests.fal.test_fal import APP, arguments  # noqa: E402
from tests.live_server import serve  # noqa: E402

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


# -------------------------------------------------------------------------------------------------------- fair shares


def test_what_goes_is_the_oldest_of_the_owner_who_has_the_most() -> None:
    store: FairStore[str] = FairStore()
    for key, owner, num_bytes in (("a", "ann", 5), ("b", "bob", 1), ("c", "bob", 1), ("d", "bob", 1)):
        store.add(key, key.upper(), owner, num_bytes)
    assert (len(store), store.num_bytes, list(store)) == (4, 8, ["A", "B", "C", "D"])
    assert store.pop_excess() == "B"
    assert store.pop_excess(by_bytes=True) == "A"
    assert store.get("a") is None and store.get("c") == "C"
    assert store.oldest() == ("c", "C")
    assert (store.pop("c"), store.pop("c"), store.pop_excess(), store.pop_excess(), store.num_bytes) == (
        "C",
        None,
        "D",
        None,
        0,
    )


def test_a_client_is_its_ipv4_address_or_its_ipv6_network() -> None:
    found = [
        owner_of({"client": (host, 1)}) for host in ("192.0.2.7", "2001:db8::1", "2001:db8::2:1", "2001:db8:0:1::1")
    ]
    assert found == ["192.0.2.7", "2001:db8::/64", "2001:db8::/64", "2001:db8:0:1::/64"]
    assert owner_of({"client": None}) == owner_of({}) == ""


def test_one_client_cannot_drop_the_results_of_others() -> None:
    store = ResultsStore(max_ended=10, seconds=100, max_bytes=10**6)
    mine, *others = (ended_job(owner) for owner in ("me", *["flood"] * 50))
    for job in (mine, *others):
        store.add(job)
    assert store.get(mine.id) is mine
    assert sum(is_kept(store, job) for job in others) == 9
    assert is_kept(store, others[-1]) and not is_kept(store, others[0])


def test_results_are_bounded_in_bytes() -> None:
    store = ResultsStore(max_ended=1000, seconds=100, max_bytes=100_000)
    mine, *others = (ended_job(owner, "x" * 30_000) for owner in ("me", *["flood"] * 9))
    for job in (mine, *others):
        store.add(job)
    assert store.get(mine.id) is mine
    assert sum(is_kept(store, job) for job in others) == 2


def test_a_result_expires_though_an_earlier_request_ended_later() -> None:
    store = ResultsStore(max_ended=10, seconds=0.0, max_bytes=10**6)
    job = ended_job("me")
    store.add(job)
    assert not is_kept(store, job)


def ended_job(owner: str, text: str = "a star") -> Job:
    job = Job(Arguments(tasks.CAPTION, "data:,", None), owner=owner)
    assert job.finish(Answer({"results": text}, {}))
    return job


def is_kept(store: ResultsStore, job: Job) -> bool:
    try:
        return store.get(job.id) is job
    except RequestError as problem:
        assert problem.status == 404
        return False


# -------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileStore]:
    store = FileStore(max_bytes=1000, max_files=20, parent=tmp_path)
    yield store
    store.close()
    assert list(tmp_path.iterdir()) == []


def token_of(address: str) -> str:
    return address.split("/")[2]


def names_on_disk(store: FileStore) -> set[str]:
    return {path.name for path in store.folder.iterdir() if path.name != ".lock"}


def test_one_client_cannot_drop_the_files_of_others(files: FileStore) -> None:
    mine = token_of(files.put(b"1" * 300, "a.png", "image/png", "me"))
    theirs = [token_of(files.put(b"2" * 100, "b.png", "image/png", "flood")) for _ in range(30)]
    assert files.get(mine) is not None
    assert [files.get(token) is not None for token in theirs] == [False] * 23 + [True] * 7
    assert names_on_disk(files) == {mine, *theirs[23:]}


def test_files_are_bounded_in_number(files: FileStore) -> None:
    mine = token_of(files.put(b"1", "a.png", "image/png", "me"))
    theirs = [token_of(files.put(b"", "b.png", "image/png", "flood")) for _ in range(50)]
    assert files.get(mine) is not None
    assert names_on_disk(files) == {mine, *theirs[-19:]}


def test_one_client_cannot_use_up_the_reservations(files: FileStore) -> None:
    token, address = files.reserve("a.png", "image/png", "me")
    for _ in range(1500):
        files.reserve("b.png", "image/png", "flood")
    assert files.is_reserved(token)
    files.put_reserved(token, b"content")
    stored = files.get(token_of(address))
    assert stored is not None and stored.path.read_bytes() == b"content"
    with pytest.raises(RequestError, match="not found"):
        files.put_reserved(token, b"again")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\ann\\cat 1.png", "cat-1.png"),
        ("x" * 10**6 + ".png", "x" * 96 + ".png"),
        ("/", "file"),
        ("", "file"),
        ("…", "file"),
    ],
)
def test_names_are_cut_and_made_safe(name: str, expected: str, files: FileStore) -> None:
    assert safe_name(name) == expected
    assert files.reserve(name, "text/html" * 1000)[1].endswith(f"/{expected}")
    reserved = files._reserved.oldest()
    assert reserved is not None
    assert (reserved[1].name, reserved[1].content_type) == (expected, "application/octet-stream")


def test_a_folder_that_a_cleaner_deleted_is_made_again(files: FileStore) -> None:
    old = token_of(files.put(b"1", "a.png", "image/png"))
    for path in files.folder.iterdir():
        path.unlink()
    files.folder.rmdir()
    new = files.put(b"2", "a.png", "image/png")
    stored = files.get(token_of(new))
    assert stored is not None and stored.path.read_bytes() == b"2"
    assert names_on_disk(files) == {token_of(new)} and (files.folder / ".lock").exists()
    assert files.find_url(f"http://x/files/{old}/a.png") is not None  # to the service, a file that is gone


# ----------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_drops_old_files_and_tries_again(small_disk: Path) -> None:
    store = FileStore(max_bytes=10**8, parent=small_disk)
    tokens = [token_of(store.put(bytes(300_000), "a.png", "image/png", "me")) for _ in range(5)]
    assert [store.get(token) is not None for token in tokens] == [False, False, True, True, True]
    assert not store.is_full
    store.close()


def test_a_file_that_does_not_fit_leaves_nothing_behind_and_can_be_sent_again(small_disk: Path) -> None:
    store = FileStore(max_bytes=10**8, parent=small_disk)
    others = small_disk / "of others"
    others.write_bytes(bytes(900_000))
    token, _ = store.reserve("a.png", "image/png")
    for _ in range(3):
        with pytest.raises(RequestError, match="full") as caught:
            store.put_reserved(token, bytes(300_000))
        assert caught.value.status == 507
    assert store.is_full and names_on_disk(store) == set()
    others.unlink()
    store.put_reserved(token, bytes(300_000))
    assert not store.is_full and names_on_disk(store) == {token}
    store.close()


def test_a_server_with_a_full_disk_answers_without_annotated_images(small_disk: Path) -> None:
    with serve("--grace", "1", environment={**ONE_THREAD, "TMPDIR": str(small_disk)}) as server:
        client = httpx.Client(base_url=server.url, timeout=60)
        fill = small_disk / "of others"
        with fill.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        detection = arguments(tasks.OBJECT_DETECTION)
        answer = client.post(f"/{APP}/object-detection", json=detection)
        assert (answer.status_code, answer.json()["image"]) == (200, None) and answer.json()["results"]["bboxes"]
        assert client.get("/ready").json() == {"status": "ready", "storage": "full"}
        reserved = client.post("/storage/upload/initiate", json={"file_name": "a.png", "content_type": "image/png"})
        urls = reserved.json()
        assert client.put(urls["upload_url"], content=bytes(8192)).status_code == 507
        fill.unlink()
        assert client.put(urls["upload_url"], content=bytes(8192)).status_code == 200
        assert client.get(urls["file_url"]).content == bytes(8192)
        assert client.get("/ready").json()["storage"] == "ok"
        assert client.post(f"/{APP}/object-detection", json=detection).json()["image"]


# ------------------------------------------------------------------------------------------------------------- signals


def folders(parent: Path) -> list[Path]:
    return list(parent.glob("florence-onnx-files-*"))


def test_the_files_of_a_killed_server_are_deleted_by_the_next(tmp_path: Path) -> None:
    environment = {**ONE_THREAD, "TMPDIR": str(tmp_path)}
    with serve(environment=environment) as killed:
        (dead,) = folders(tmp_path)
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait(10)
        assert folders(tmp_path) == [dead]
        with serve(environment=environment):
            (first,) = folders(tmp_path)
            assert first != dead
            with serve("--grace", "1", environment=environment):
                assert len(folders(tmp_path)) == 2 and first in folders(tmp_path)
    assert folders(tmp_path) == []


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    young, link = tmp_path / "florence-onnx-files-young", tmp_path / "florence-onnx-files-link"
    young.mkdir()
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(tmp_path / "elsewhere")
    old = tmp_path / "florence-onnx-files-old"
    old.mkdir()
    os.utime(old, (1, 1))
    FileStore(1000, parent=tmp_path).close()
    assert young.is_dir() and link.is_symlink() and (tmp_path / "elsewhere").is_dir()
    assert not old.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_hangup_drains_the_server_as_sigterm_does(tmp_path: Path) -> None:
    with serve("--grace", "0", environment={**ONE_THREAD, "TMPDIR": str(tmp_path)}) as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(20) == 0
        assert "SIGHUP: finishing accepted requests" in server.stderr
    assert folders(tmp_path) == []


# --------------------------------------------------------------------------------------------------- budget and tokens


@pytest.fixture(scope="module")
def context() -> Iterator[ServerContext]:
    made = ServerContext(Florence2.from_pretrained("demo", device="cpu"), ServerSettings())
    yield made
    made.close()


def test_upload_tokens_are_signed_and_need_no_memory(context: ServerContext) -> None:
    token = context.make_token()
    end, _, signature = token.partition("-")
    assert context.is_valid_token(token)
    for forged in ("", "-", f"{int(end, 16) + 9:x}-{signature}", f"{end}-{signature[:-1]}0x", "zz-" + signature, "é"):
        assert not context.is_valid_token(forged)


def test_a_token_that_has_expired_is_not_valid(context: ServerContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florence_onnx.server.context.TOKEN_SECONDS", -1.0)
    assert not context.is_valid_token(context.make_token())


def test_bodies_beyond_the_budget_get_429_and_are_given_back() -> None:
    with serve("--accepted-mb", "1", "--grace", "1", environment=ONE_THREAD) as server:
        client = httpx.Client(base_url=server.url, timeout=60)
        large: dict[str, Any] = {**arguments(tasks.CAPTION), "filler": "x" * 2**21}
        for _ in range(3):
            refused = client.post(f"/{APP}/caption", json=large)
            assert (refused.status_code, refused.json()["error_type"]) == (429, "concurrent_requests_limit")
            assert client.post(f"/{APP}/caption", json=arguments(tasks.CAPTION)).status_code == 200
        assert client.get("/health").status_code == 200
