"""Models from a hub on the loopback interface: cache first, only the needed files, clear errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from florence_onnx import BundleFileMissingError, BundleNotFoundError, Florence2
from florence_onnx.bundles import bundle
from florence_onnx.bundles import hub as hub_names
from tests import descriptions
from tests.local_hub import LocalHub
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
    hub.folder = tmp_path / "several"
    for precision in ("fp32", "int8"):  # the same files, labelled with another precision
        copy = Path(shutil.copytree(bundle.DEMO_DIRECTORY, hub.folder / precision))
        descriptions.change(copy, precision=precision)
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
