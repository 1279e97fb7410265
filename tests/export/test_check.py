"""`check` against a hub on the loopback interface, with the demo model as the published checkpoint and planted errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from florence_onnx import InputError
from florence_onnx.bundles import bundle
from tests import shared_data
from tests.command_line import run_here
from tests.conftest import NO_TORCH
from tests.export import test_published_models as of_hub
from tests.local_hub import LocalHub

pytest.importorskip("optimum.exporters", reason=NO_TORCH)
safetensors = pytest.importorskip("safetensors.torch", reason=NO_TORCH)
from export.__main__ import main  # noqa: E402
from export.published import check as checking  # noqa: E402
from export.published.answers import PUBLISHED_ANSWERS, facts, read_published, split  # noqa: E402
from export.published.check import Settings, check  # noqa: E402
from export.published.rows import Row, exit_code  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "export" / "demo" / "checkpoint"
SAMPLES = bundle.DEMO_DIRECTORY.parent / "samples"
GOOD, BROKEN, OTHER, ABSENT = "owner/model", "owner/broken", "owner/other-weights", "owner/absent"
DATA = "owner/images"
SIZE = [384, 355]
"""Of scene-1.png."""
SHORT = {"num_beams": 1, "max_new_tokens": 12}


@dataclass
class Site:
    """The hub, with what was published on it."""

    hub: LocalHub
    answers: Path
    work: Path


def image_line(name: str, **more: Any) -> dict[str, Any]:
    return {"image": name, "size": SIZE, "repository": DATA, "path": f"photos/{name}", **more}


def answer_line(checkpoint: str, text: str, **more: Any) -> dict[str, Any]:
    about = {"task": "<CAPTION>", "image": "scene-1.png", "source": "its card", "options": SHORT}
    return {"checkpoint": checkpoint, **about, "text": text, **more}


@pytest.fixture(scope="module")
def caption() -> str:
    """What the demo checkpoint says, by transformers: what its author would have published."""
    from export.checkpoints.checkpoint import load_checkpoint
    from export.verification import reference
    from florence_onnx import GenerationOptions, tasks
    from florence_onnx.images import decoding, preprocessing

    loaded = load_checkpoint(CHECKPOINT)
    inputs = loaded.preprocessing
    image = decoding.load(SAMPLES / "scene-1.png")
    pixels = preprocessing.preprocess(image, size=inputs.image_size, mean=inputs.image_mean, std=inputs.image_std)
    (tokens,) = reference.generate(loaded, pixels, [tasks.CAPTION.format_prompt()], GenerationOptions(**SHORT))
    return str(loaded.tokenizer.decode(list(tokens), skip_special_tokens=False))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    photos = tmp_path / "data" / "photos"
    photos.mkdir(parents=True)
    shutil.copy(SAMPLES / "scene-1.png", photos)
    with LocalHub(CHECKPOINT, tmp_path / "cache", monkeypatch) as hub:
        hub.others[f"datasets/{DATA}"] = tmp_path / "data"
        yield Site(hub, tmp_path / "answers.jsonl", tmp_path / "work")


def publish(site: Site, *lines: dict[str, Any]) -> None:
    site.answers.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def run(site: Site, *arguments: str | Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and progress of the command."""
    done = run_here(main, "check", *arguments, "--answers", site.answers, "--work", site.work, "--json")
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def copy_of_checkpoint(folder: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, folder))


def test_planted_errors_are_named_each_in_its_row(site: Site, caption: str, tmp_path: Path) -> None:
    """A wrong published answer, a truncated and a changed weight, a missing image, a repository that is not there."""
    broken, other = (copy_of_checkpoint(tmp_path / name) for name in ("broken", "other"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    tensors = safetensors.load_file(other / "model.safetensors")
    embedding = max(tensors, key=lambda name: tensors[name].shape[0])
    tensors[embedding] = tensors[embedding].flip(1).contiguous()
    safetensors.save_file(tensors, other / "model.safetensors")
    site.hub.others |= {BROKEN: broken, OTHER: other}
    publish(
        site,
        image_line("scene-1.png"),
        image_line("gone.png"),
        image_line("unknown.png", repository=None, path=None),
        image_line("dead.png", repository=None, path=None, url=f"{site.hub.url}/no/such/image.png"),
        image_line("wrong.png", path="photos/scene-1.png", size=[640, 480]),
        answer_line(GOOD, caption),
        answer_line(GOOD, "</s><s>something that it never said</s>"),
        answer_line(GOOD, "</s><s>of other weights</s>", caveat="printed long ago"),
        *(answer_line(GOOD, caption, image=f"{name}.png") for name in ("gone", "unknown", "dead", "wrong")),
        *(answer_line(name, caption) for name in (BROKEN, ABSENT, OTHER)),
    )
    code, report, progress = run(site)
    rows = [Row(**row) for row in report["rows"]]
    good = [row for row in rows if row.checkpoint == GOOD]
    verdicts = ["agrees", "agrees", "disagrees", "unsettled", *["not tried"] * 4]
    assert [row.verdict for row in good] == verdicts, good
    assert (code, report["exit_code"]) == (1, 1)
    assert "tokens as transformers 4.57" in good[0].detail
    assert "is not the published text (5 words), which is at its card" in good[2].detail
    assert "transformers gives the same as this package here" in good[2].detail
    assert good[3].detail.endswith("printed long ago")
    assert "cannot download photos/gone.png of the data set owner/images" in good[4].detail
    assert "no address of unknown.png is known" in good[5].detail and "--images" in good[5].detail
    assert "404" in good[6].detail and "--images" in good[6].detail
    assert "384 × 355 pixels instead of 640 × 480" in good[7].detail
    by_name = {name: [row for row in rows if row.checkpoint == name] for name in (BROKEN, ABSENT, OTHER)}
    assert [row.verdict for row in by_name[BROKEN]] == ["not tried", "not tried"]
    assert "model.safetensors" in by_name[BROKEN][0].detail
    assert "no such repository on the hub" in by_name[ABSENT][0].detail
    assert [row.verdict for row in by_name[OTHER]] == ["agrees", "disagrees"]  # a true export of other weights
    assert report["unknown_images"] == {"scene-1.png": bundle.sha256(SAMPLES / "scene-1.png")}
    assert "to download: owner/model: 7 MB in 7 files" in progress
    assert "owner/absent: size unknown" in progress
    # what could not be tried is kept to be tried again; what is finished is removed
    assert not (site.work / "exports").exists() or not any((site.work / "exports").iterdir())
    assert (tmp_path / "cache" / "models--owner--model").is_dir()
    assert not (tmp_path / "cache" / "models--owner--other-weights").exists()


def test_all_agree_with_a_local_image_and_nothing_is_left_behind(site: Site, caption: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    shutil.copy(SAMPLES / "scene-1.png", tmp_path / "mine" / "gone.png")
    known = bundle.sha256(SAMPLES / "scene-1.png")
    publish(site, image_line("gone.png", sha256=known), answer_line(GOOD, caption, image="gone.png"))
    code, report, _ = run(site, GOOD, "--images", tmp_path / "mine", "--keep")
    assert (code, report["summary"], report["unknown_images"]) == (0, "2 agrees", {}), report
    assert (site.work / "exports" / "owner--model" / bundle.DESCRIPTION).is_file()
    assert (tmp_path / "cache" / "models--owner--model").is_dir()
    assert "photos/gone.png" not in site.hub.requested
    code, again, progress = run(site)  # done before; without --keep the rest is removed
    assert (code, again["rows"]) == (0, report["rows"]) and "done before" in progress
    assert not site.work.exists()
    assert not list((tmp_path / "cache").glob("models--*"))


def publish_about_fakes(site: Site) -> None:
    publish(site, image_line("scene-1.png"), *(answer_line(name, "</s><s>a</s>") for name in ("o/one", "o/two")))


def fake(monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, Any]) -> list[str]:
    """Replaces the check of one checkpoint; returns the names for which it was called."""
    called: list[str] = []

    def answer(target: str, *_: Any) -> list[Row]:
        called.append(target)
        found = outcomes[target]
        if isinstance(found, BaseException):
            raise found
        return [Row(target, "export", found, "said")]

    monkeypatch.setattr(checking, "_check_checkpoint", answer)
    return called


def test_after_an_interruption_what_is_done_is_not_repeated(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_about_fakes(site)
    called = fake(monkeypatch, {"o/one": "agrees", "o/two": KeyboardInterrupt()})
    done = run_here(main, "check", "--answers", site.answers, "--work", site.work)
    assert done.returncode == 130 and "goes on where it stopped" in done.stderr
    assert called == ["o/one", "o/two"]
    called = fake(monkeypatch, {"o/one": "agrees", "o/two": "agrees"})
    code, report, progress = run(site)
    assert code == 0 and called == ["o/two"] and "o/one: done before" in progress
    assert [row["checkpoint"] for row in report["rows"]] == ["o/one", "o/two"]


def test_what_nobody_foresaw_is_a_row_and_the_rest_is_tried(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_about_fakes(site)
    fake(monkeypatch, {"o/one": ZeroDivisionError("oops"), "o/two": "agrees"})
    code, report, _ = run(site)
    assert code == 2
    assert report["rows"][0]["detail"] == "ZeroDivisionError: oops; please report it"
    assert report["rows"][-1]["verdict"] == "agrees"


def test_a_full_disk_is_said_before_a_download(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site, image_line("scene-1.png"), answer_line(GOOD, "</s><s>a</s>"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    code, report, _ = run(site)
    assert code == 2
    assert "GB of disk space are needed" in report["rows"][0]["detail"]
    assert "model.safetensors" not in site.hub.requested


def test_the_table_says_what_the_json_says(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_about_fakes(site)
    fake(monkeypatch, {"o/one": "agrees", "o/two": "disagrees"})
    done = run_here(main, "check", "--answers", site.answers, "--work", site.work)
    assert done.returncode == 1
    assert "1 agrees, 1 disagrees" in done.stdout and "o/two" in done.stdout and "transformers 4.57" in done.stdout


def test_a_folder_of_others_is_not_used(site: Site) -> None:
    publish_about_fakes(site)
    site.work.mkdir()
    (site.work / "thesis.txt").write_text("mine")
    code, _, progress = run(site)
    assert code == 2 and "is not empty and no check made it" in progress
    assert (site.work / "thesis.txt").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": "<CAPTION>"', "line 1: JSONDecodeError"),
        ('{"task": "<NONE>", "checkpoint": "a/b", "image": "x", "source": "s", "text": "a"}', "line 1: UnknownTask"),
        ('{"task": "<CAPTION>", "checkpoint": "a/b", "image": "x", "source": "s"}', "needs parts, sha256 or text"),
        (
            '{"task": "<CAPTION>", "checkpoint": "a/b", "image": "x", "source": "s", "text": "a"}',
            "no line for the images x",
        ),
        ('{"image": "x", "size": [0, 5]}', "line 1: InputError"),
    ],
)
def test_malformed_answers_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=message):
        read_published(path)


def test_parts_are_compared_one_by_one(tmp_path: Path) -> None:
    text = "</s><s>car<loc_1><loc_2><loc_3><loc_4>wheel<loc_5><loc_6><loc_7><loc_8></s><pad>"
    path = tmp_path / "answers.jsonl"
    publish_to = [image_line("x.png"), answer_line("a/b", text, task="<OD>", image="x.png")]
    path.write_text("\n".join(map(json.dumps, publish_to)))
    (answer,) = read_published(path).answers
    assert answer.compare(text.replace("<pad>", "")) is None
    assert answer.compare(text.replace("<loc_7>", "<loc_9>")) == (
        "1 of 2 parts differ, the first is part 2: 'wheel' at 5,6,9,8, published 'wheel' at 5,6,7,8"
    )
    assert "nothing, published 'wheel'" in str(answer.compare(text.split("wheel", maxsplit=1)[0]))


def test_exit_codes() -> None:
    rows = {verdict: Row("a/b", "export", verdict, "") for verdict in ("agrees", "disagrees", "unsettled", "not tried")}
    assert exit_code([rows["agrees"]]) == 0
    assert exit_code([rows["agrees"], rows["not tried"], rows["disagrees"]]) == 1
    assert exit_code([rows["agrees"], rows["not tried"]]) == exit_code([rows["unsettled"]]) == exit_code([]) == 2


def test_the_packages_answers_are_those_recorded() -> None:
    """Against the rows of others that are not committed: the same boxes, and digests of the same texts."""
    recorded = [row for row in shared_data.rows("golden.jsonl") if row.get("raw") or row.get("raw_reconstructed")]
    known = {(answer.task.token, answer.parts or answer.sha256) for answer in read_published(PUBLISHED_ANSWERS).answers}
    found = 0
    for row in recorded:
        kept = facts(row.get("raw") or row["raw_reconstructed"])
        found += (row["task"], kept.get("parts") or kept["sha256"]) in known
    assert found >= 16


def test_the_packages_answers_have_sources_and_no_sentences() -> None:
    published = read_published()
    assert len(published.answers) == 20 and set(published.images) == {answer.image for answer in published.answers}
    assert all(answer.source for answer in published.answers)
    for line in PUBLISHED_ANSWERS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert "text" not in row
        assert all(len(label.split()) <= 6 for label, _ in row.get("parts") or ())
    assert split("a<loc_1><loc_2>b") == (("a", (1, 2)), ("b", ()))


def test_check_is_not_bound_to_the_command(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_about_fakes(site)
    fake(monkeypatch, {"o/one": "agrees"})
    rows = list(check(read_published(site.answers), ["o/one"], Settings(site.work)))
    assert [row.verdict for row in rows] == ["agrees"]


@pytest.mark.parametrize("outcome", ["agrees", "disagrees", "not tried", "no network"])
def test_the_tests_marked_hub_pass_fail_or_say_why_not(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome: str
) -> None:
    """`pytest -m hub` on this hub: the test itself, with what the check of one checkpoint finds."""
    publish(site, image_line("scene-1.png"), answer_line(GOOD, "</s><s>a</s>"))
    monkeypatch.setattr(of_hub, "PUBLISHED", read_published(site.answers))
    fake(monkeypatch, {GOOD: outcome})
    if outcome == "no network":
        site.hub.stop()
        with pytest.raises(pytest.skip.Exception, match="needs a network and the hub, to download owner/model"):
            of_hub.test_a_published_checkpoint(GOOD, tmp_path)
    elif outcome == "disagrees":
        with pytest.raises(AssertionError):
            of_hub.test_a_published_checkpoint(GOOD, tmp_path)
    elif outcome == "not tried":
        with pytest.raises(pytest.skip.Exception, match="export: said"):
            of_hub.test_a_published_checkpoint(GOOD, tmp_path)
    else:
        of_hub.test_a_published_checkpoint(GOOD, tmp_path)
