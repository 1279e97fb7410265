"""Models from a hub on the loopback interface: cache first, only the needed files, clear errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from florence_onnx import (
    BundleFileMissingError,
    BundleFormatError,
    BundleNotFoundError,
    CorruptGraphError,
    Florence2,
    HubAccessError,
    InputError,
)
from florence_onnx.bundles import bundle
from florence_onnx.bundles import hub as hub_names
from florence_onnx.bundles.pulling import pull
from tests import descriptions
from tests.local_hub import LocalHub, files_in
from tests.own_tasks import SAME_AS, copy_demo


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with LocalHub(bundle.DEMO_DIRECTORY, tmp_path / "cache", monkeypatch) as found:
        yield found


def test_a_bundle_comes_from_the_hub_once_and_then_from_the_cache(hub: LocalHub) -> None:
    model = Florence2.from_pretrained("owner/model", device="cpu")
    assert model.info()["precision"] == "fp16"
    assert set(hub.requested) >= {*bundle.GRAPHS, bundle.WEIGHTS, bundle.DESCRIPTION, bundle.TOKENIZER}
    hub.requested.clear()
    Florence2.from_pretrained("owner/model", device="cpu")
    assert hub.requested == []
    hub.stop()
    Florence2.from_pretrained("owner/model", device="cpu")


def test_a_file_missing_from_the_cache_is_downloaded(hub: LocalHub) -> None:
    link = hub_names.resolve("owner/model").path / bundle.DECODER
    link.resolve().unlink()  # the content is stored elsewhere in the cache
    link.unlink()
    hub.requested.clear()
    Florence2.from_pretrained("owner/model", device="cpu")
    assert hub.requested == [bundle.DECODER]


def test_an_unknown_repository_and_an_unreachable_hub_say_what_to_do(hub: LocalHub) -> None:
    with pytest.raises(BundleNotFoundError, match=r"no hub repository 'owner/other'.*hf auth login"):
        Florence2.from_pretrained("owner/other")
    with pytest.raises(BundleNotFoundError, match="neither a directory nor a hub repository"):
        Florence2.from_pretrained("owner/--bad..name")
    hub.stop()
    with pytest.raises(
        BundleNotFoundError, match=r"'owner/model' is not in the local cache and the hub could not be reached"
    ):
        Florence2.from_pretrained("owner/model")


def test_a_repository_without_a_model_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    hub.folder = tmp_path / "empty"
    hub.folder.mkdir()
    (hub.folder / "florence_onnx.json").write_text((bundle.DEMO_DIRECTORY / "florence_onnx.json").read_text())
    with pytest.raises(BundleFileMissingError, match="missing"):
        Florence2.from_pretrained("owner/model")


@pytest.mark.parametrize(("asked", "taken"), [(None, "int8"), ("fp32", "fp32")])
def test_of_several_bundles_only_the_chosen_one_is_downloaded(
    hub: LocalHub, tmp_path: Path, asked: str | None, taken: str
) -> None:
    hub.folder = relabelled(tmp_path / "several", ("fp32", "int8"))
    model = Florence2.from_pretrained("owner/model", device="cpu", precision=asked)
    assert model.info()["precision"] == taken
    graphs = {name for name in hub.requested if not name.endswith(".json")}
    assert graphs == {f"{taken}/{name}" for name in (*bundle.GRAPHS, bundle.WEIGHTS)}
    hub.stop()
    Florence2.from_pretrained("owner/model", device="cpu", precision=asked)  # from the cache


def test_own_tasks_come_with_the_bundle(hub: LocalHub, tmp_path: Path) -> None:
    hub.folder = copy_demo(tmp_path / "own-tasks")
    with pytest.raises(BundleNotFoundError, match="'owner/model' is not in the local cache"):
        hub_names.resolve("owner/model", local_only=True)
    assert hub.requested == []
    assert list(hub_names.resolve("owner/model").tasks) == list(SAME_AS)
    hub.stop()
    assert list(hub_names.resolve("owner/model", local_only=True).tasks) == list(SAME_AS)


# ---------------------------------------------------------------------------------------------------------------- pull


def relabelled(folder: Path, precisions: tuple[str, ...]) -> Path:
    """The demo's files once for each precision, labelled with it."""
    for precision in precisions:
        copy = Path(shutil.copytree(bundle.DEMO_DIRECTORY, folder / precision))
        descriptions.change(copy, precision=precision)
    return folder


def test_a_pull_brings_every_file_and_checks_it(hub: LocalHub, tmp_path: Path) -> None:
    found = pull("owner/model", tmp_path / "out")
    names = set(files_in(bundle.DEMO_DIRECTORY))
    assert found.num_hashed == len(names) - 1  # all but the description itself
    assert found.num_bytes == sum(path.stat().st_size for path in files_in(bundle.DEMO_DIRECTORY).values())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (bundle.DEMO_DIRECTORY / name).read_bytes()
    hub.requested.clear()
    assert pull("owner/model", tmp_path / "out") == found  # nothing is sent twice
    assert hub.requested == []
    hub.stop()
    assert Florence2.from_pretrained(tmp_path / "out", device="cpu").info()["precision"] == "fp16"


def test_a_pull_without_a_folder_stays_in_the_cache(hub: LocalHub) -> None:
    found = pull("owner/model")
    assert [each.precision for each in found.bundles] == ["fp16"]
    hub.stop()
    Florence2.from_pretrained("owner/model", device="cpu")


def test_a_pull_takes_all_precisions_or_the_asked_one(hub: LocalHub, tmp_path: Path) -> None:
    hub.folder = relabelled(tmp_path / "several", ("fp32", "int8"))
    found = pull("owner/model", tmp_path / "out")
    assert [each.precision for each in found.bundles] == ["fp32", "int8"]
    hub.requested.clear()
    assert [each.precision for each in pull("owner/model", tmp_path / "one", precision="int8").bundles] == ["int8"]
    assert {name.split("/")[0] for name in hub.requested if name.endswith(".onnx")} == {"int8"}
    with pytest.raises(BundleFormatError, match="has precisions fp32, int8, not fp16"):
        pull("owner/model", tmp_path / "out", precision="fp16")


@pytest.mark.parametrize("is_large", [False, True])
def test_a_pull_names_the_file_that_is_damaged(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    """Also a large one, whose hash is not checked when it is loaded."""
    if is_large:
        monkeypatch.setattr(bundle, "MAX_HASHED_BYTES", 1000)
    hub.folder = Path(shutil.copytree(bundle.DEMO_DIRECTORY, tmp_path / "damaged"))
    weights = hub.folder / bundle.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptGraphError, match=r"weights.data is damaged.*florence-onnx pull owner/model --force"):
        pull("owner/model", tmp_path / "out")
    hub.folder = bundle.DEMO_DIRECTORY
    assert pull("owner/model", tmp_path / "out", force=True).num_hashed


def test_a_pull_refuses_what_it_cannot_do(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and no pull made it"):
        pull("owner/model", tmp_path / "own")
    with pytest.raises(InputError, match="is no hub repository"):
        pull("model")
    with pytest.raises(BundleNotFoundError, match="no hub repository 'owner/other'"):
        pull("owner/other")
    with pytest.raises(BundleNotFoundError, match="has no revision 'v9'"):
        pull("owner/model", revision="v9")
    with pytest.raises(HubAccessError, match="licence of owner/gated must be accepted"):
        pull("owner/gated")
    hub.folder = tmp_path / "checkpoint"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text("{}")
    with pytest.raises(BundleNotFoundError, match=r"contains no ONNX model.*florence-onnx-export owner/model OUT"):
        pull("owner/model", tmp_path / "none")
