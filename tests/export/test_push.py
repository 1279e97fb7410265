"""`push` and `pull` against a hub on the loopback interface: a round trip, the model card, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from florence_onnx import (
    CorruptGraphError,
    Florence2,
    HubAccessError,
    HubError,
    InputError,
    VerificationError,
    tasks,
)
from florence_onnx.bundles import bundle
from florence_onnx.bundles.configuration import configure
from florence_onnx.bundles.description import sealed
from florence_onnx.bundles.pulling import pull
from tests import descriptions
from tests.bundles.test_hub import relabelled
from tests.command_line import run_here
from tests.conftest import NO_TORCH, Exported
from tests.local_hub import TOKEN, LocalHub, files_in
from tests.own_tasks import ENTRIES, SAME_AS

yaml = pytest.importorskip("yaml", reason=NO_TORCH)
from export.__main__ import main  # noqa: E402
from export.checkpoints.model_card import read_facts  # noqa: E402
from export.publishing.push import find_missing, push  # noqa: E402

SCENE = bundle.DEMO_DIRECTORY.parent / "samples" / "scene-1.png"
NAME = "owner/florence"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub with a checkpoint's repository, `owner/model`, whose card states a licence."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with LocalHub(folder, tmp_path / "cache", monkeypatch) as found:
        yield found


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The demo's bundle, which is small and verified, as if exported from `owner/model` on the hub."""
    folder = Path(shutil.copytree(bundle.DEMO_DIRECTORY, tmp_path / "out"))
    edit(folder, lambda described: described["source"].update(name="owner/model", revision="0123abcd"))
    return folder


def edit(folder: Path, change: Any) -> None:
    described = descriptions.read(folder)
    change(described)
    descriptions.write(folder, sealed(described))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_here(main, *arguments)


def card_of(hub: LocalHub, revision: str = "main") -> tuple[dict[str, Any], str]:
    """Metadata and text of the model card that was pushed."""
    folder = hub.repository(NAME, revision)
    assert folder is not None
    _, metadata, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_round_trip_is_bit_identical(hub: LocalHub, exported: Path, tmp_path: Path) -> None:
    done = run("push", exported, NAME)
    assert done.returncode == 0, done.stderr
    assert f"florence-onnx pull {NAME} DIR" in done.stdout
    back = run("pull", NAME, tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert f'Florence2.from_pretrained("{tmp_path / "back"}")' in back.stdout
    for name, path in files_in(exported).items():
        assert (tmp_path / "back" / name).read_bytes() == path.read_bytes(), name
    answers = [
        Florence2.from_pretrained(path, device="cpu").run(tasks.CAPTION, SCENE).text for path in (exported, NAME)
    ]
    assert answers[0] == answers[1]


def test_own_tasks_are_pushed_with_their_bundle(hub: LocalHub, exported: Path, tmp_path: Path) -> None:
    (exported / "tasks.json").write_text(json.dumps({"tasks": ENTRIES}))
    push(exported, NAME)
    pull(NAME, tmp_path / "back")
    assert (tmp_path / "back" / "tasks.json").read_bytes() == (exported / "tasks.json").read_bytes()
    assert list(bundle.read(tmp_path / "back").tasks) == list(SAME_AS)


def test_the_card_states_what_the_verification_found(hub: LocalHub, exported: Path) -> None:
    push(exported, NAME)
    metadata, text = card_of(hub)
    assert metadata["library_name"] == "florence_onnx"
    assert metadata["pipeline_tag"] == "image-text-to-text"
    assert (metadata["license"], metadata["base_model"]) == ("mit", "owner/model")
    assert {"onnx", "florence-2"} <= set(metadata["tags"])
    assert "| fp16 | fp16 | 128 × 128 | 7.2 MB |" in text
    verification = json.loads((exported / bundle.DESCRIPTION).read_text())["verification"]
    for name, error in verification["graphs"].items():
        assert f"| fp16 | `{name}` | {error['max_abs']:.2e} | {error['max_rel']:.2e} |" in text
    assert "| fp16 | answers, beam-3 |  |  | 53 of 54 |" in text
    assert "transformers 4.57.6" in text and "revision `0123abcd`" in text
    assert f'Florence2.from_pretrained("{NAME}")' in text
    assert "Not verified" not in text


def test_the_card_states_changed_defaults(hub: LocalHub, exported: Path) -> None:
    configure(exported, {"num_beams": 1})
    pushed = push(exported, NAME)
    assert bundle.CONFIGURED in pushed.files
    assert "`num_beams=1`" in card_of(hub)[1]


def test_several_precisions_go_into_one_repository(hub: LocalHub, tmp_path: Path) -> None:
    push(relabelled(tmp_path / "several", ("fp16", "int8")), NAME, license="mit", private=True)
    assert NAME in hub.private
    assert [each.precision for each in pull(NAME).bundles] == ["fp16", "int8"]
    metadata, text = card_of(hub)
    assert "base_model" not in metadata  # the demo comes from a folder
    assert 'precision="int8"' in text and text.count("128 × 128") == 2


def test_a_bundle_of_several_image_sizes_goes_to_the_hub_whole(hub: LocalHub, sized: Exported) -> None:
    push(sized.bundle, NAME, license="mit")
    assert (
        pull(NAME).bundles[0].image_sizes == bundle.read(sized.bundle).image_sizes == ((128, 128), (64, 64), (160, 96))
    )
    folder = hub.repository(NAME)
    assert folder is not None
    assert {path.name for path in sized.bundle.glob("vision_encoder*")} <= set(files_in(folder))
    text = card_of(hub)[1]
    assert "| 128 × 128, 64 × 64, 160 × 96 |" in text and "answers, greedy, 64x64 |" in text
    unverified = bundle.read(sized.bundle)
    del unverified.verification["graphs"]["vision_encoder_64x64.onnx"]  # type: ignore[attr-defined]
    assert find_missing(unverified) == "vision_encoder_64x64.onnx was not compared with the checkpoint"


def test_a_revision_is_a_branch(hub: LocalHub, exported: Path) -> None:
    push(exported, NAME, revision="v2")
    assert pull(NAME, revision="v2").num_hashed
    assert hub.repository(NAME, "main") is not None and not files_in(hub.storage / NAME / "main")
    assert 'revision="v2"' in card_of(hub, "v2")[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda verification: verification.clear(), "no record of a verification"),
        (lambda verification: verification["graphs"].pop("decoder.onnx"), "decoder.onnx was not compared"),
        (lambda verification: verification["tokens"].clear(), "no answers were compared"),
    ],
)
def test_an_unverified_bundle_is_refused_unless_asked(hub: LocalHub, exported: Path, change: Any, message: str) -> None:
    edit(exported, lambda described: change(described["verification"]))
    done = run("push", exported, NAME)
    assert done.returncode == 2
    assert message in done.stderr and "--unverified" in done.stderr
    assert not hub.has(NAME)
    assert run("push", exported, NAME, "--unverified").returncode == 0
    assert "**Not verified** (fp16)" in card_of(hub)[1] and message in card_of(hub)[1]


def test_other_tokens_in_fp32_are_no_verification(hub: LocalHub, exported: Path) -> None:
    edit(exported, lambda described: described.update(precision="fp32"))
    with pytest.raises(VerificationError, match=r"in fp32 tokens differ from the checkpoint's \(beam-3\)"):
        push(exported, NAME)


def test_a_file_that_was_changed_is_refused(hub: LocalHub, exported: Path) -> None:
    content = bytearray((exported / bundle.WEIGHTS).read_bytes())
    content[1000] ^= 1
    (exported / bundle.WEIGHTS).write_bytes(content)
    with pytest.raises(CorruptGraphError, match=r"weights\.data is damaged"):
        push(exported, NAME, unverified=True)
    assert not hub.has(NAME)


def test_a_wrong_token_and_none_say_what_to_do(
    hub: LocalHub, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubAccessError, match=r"refuses the token for owner/florence \(401\).*hf auth login"):
        push(exported, NAME)
    monkeypatch.delenv("HF_TOKEN")
    with (
        mock.patch("huggingface_hub.get_token", return_value=None),
        pytest.raises(HubAccessError, match="no token of the hub"),
    ):
        push(exported, NAME)
    assert not hub.has(NAME)


def test_an_interrupted_push_publishes_nothing_and_goes_on(hub: LocalHub, exported: Path) -> None:
    hub.num_uploads_left = 2
    with pytest.raises(
        HubError, match=r"did not finish \(.*\); nothing of it is published.*Run the same command again"
    ):
        push(exported, NAME)
    assert not files_in(hub.storage / NAME / "main")
    sent = list(hub.uploaded)
    assert len(sent) == 2
    hub.num_uploads_left = None
    push(exported, NAME)
    assert len(hub.uploaded) == len(set(hub.uploaded)) == 6  # graphs, weights, tokenizer: none of them twice
    assert pull(NAME).num_hashed


def test_ctrl_c_says_what_to_do(hub: LocalHub, exported: Path) -> None:
    with mock.patch("export.commands.push.push_bundles", side_effect=KeyboardInterrupt):
        done = run("push", exported, NAME)
    assert done.returncode == 130
    assert "nothing of it is published" in done.stderr and "Run the same command again" in done.stderr


def test_a_hub_out_of_reach_is_an_error_of_ours(hub: LocalHub, exported: Path) -> None:
    hub.stop()
    with pytest.raises(HubError, match="the push to owner/florence did not finish"):
        push(exported, NAME, license="mit")


def test_an_unknown_licence_is_asked_for(hub: LocalHub, exported: Path) -> None:
    edit(exported, lambda described: described["source"].update(name="my-fine-tune"))
    with pytest.raises(InputError, match=r"the licence of my-fine-tune is not known; give it with --license"):
        push(exported, NAME)
    edit(exported, lambda described: described["source"].update(name="owner/removed"))
    with pytest.raises(InputError, match="the licence of owner/removed is not known"):
        push(exported, NAME)
    edit(exported, lambda described: described["source"].update(license="apache-2.0", base_model="owner/model"))
    push(exported, NAME)
    assert card_of(hub)[0]["license"] == "apache-2.0"
    assert card_of(hub)[0]["base_model"] == "owner/model"


def test_files_of_another_bundle_are_not_left_beside_this_one(hub: LocalHub, exported: Path, tmp_path: Path) -> None:
    push(exported, NAME)
    (hub.storage / NAME / "main" / "notes.txt").write_text("mine")
    several = relabelled(tmp_path / "several", ("fp16", "int8"))
    with pytest.raises(InputError, match=r"has files of another bundle \(decoder.onnx.*--replace"):
        push(several, NAME, license="mit")
    push(several, NAME, license="mit", replace=True)
    names = set(files_in(hub.storage / NAME / "main"))
    assert bundle.DESCRIPTION not in names and {"notes.txt", "fp16/weights.data"} <= names


def test_what_belongs_to_no_bundle_is_not_pushed(hub: LocalHub, exported: Path) -> None:
    (exported / "secret.txt").write_text("mine")
    done = run("push", exported, NAME)
    assert "not pushed, because they belong to no bundle: secret.txt" in done.stderr
    assert "secret.txt" not in files_in(hub.storage / NAME / "main")


@pytest.mark.parametrize("name", ["florence", "a/b/c", "../x", "owner/", "owner/na me"])
def test_names_of_repositories_are_checked(hub: LocalHub, exported: Path, name: str) -> None:
    with pytest.raises(InputError, match="is no hub repository; give one as owner/name"):
        push(exported, name)


def test_a_checkpoints_card_is_read(tmp_path: Path) -> None:
    assert read_facts(tmp_path) == {"license": None, "base_model": None}
    (tmp_path / "README.md").write_text("---\nlicense: [mit, other]\nbase_model: a/b\n---\n")
    assert read_facts(tmp_path) == {"license": "mit", "base_model": "a/b"}
    (tmp_path / "README.md").write_text("---\nlicense: {: [\n---\n")
    assert read_facts(tmp_path) == {"license": None, "base_model": None}
