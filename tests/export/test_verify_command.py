"""`python -m export verify`: its figures on whole models, its exit codes, and the arguments that it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import BundleFormatError, Florence2, GenerationOptions, InputError, tasks
from florence_onnx.bundles import bundle
from tests import descriptions
from tests.command_line import run_here
from tests.conftest import NO_TORCH, Exported
from tests.exported_bundles import SIZES

pytest.importorskip("rapidfuzz", reason=NO_TORCH)
onnx = pytest.importorskip("onnx", reason=NO_TORCH)
from export.__main__ import main  # noqa: E402
from export.verification.agreement import Answer, words  # noqa: E402
from export.verification.answerers import is_bundle, open_reference  # noqa: E402
from export.verification.questions import (  # noqa: E402
    DEFAULT_REGION,
    DEFAULT_TEXT,
    NamedImage,
    Question,
    find_images,
    make_questions,
)
from florence_onnx.tasks import parse  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = bundle.DEMO_DIRECTORY.parent / "samples"
DEMO_CHECKPOINT = REPOSITORY / "export" / "demo" / "checkpoint"
SHORT = ("--max-new-tokens", "12")
SHARES = ("exact", "token_agreement", "token_similarity")


def run_verify_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported torch already."""
    return run_here(main, "verify", *arguments)


def run_verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export", "verify", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def damaged(tiny: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, with noise added to the weights of one product of its decoder."""
    output = tmp_path_factory.mktemp("damaged") / "bundle"
    shutil.copytree(tiny.bundle, output)
    model = onnx.load(str(output / bundle.DECODER), load_external_data=False)
    names = {node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "FusedMatMul")}
    tensor = next(each for each in model.graph.initializer if each.name in names and each.external_data)
    place = {item.key: item.value for item in tensor.external_data}
    weights = np.memmap(
        output / bundle.WEIGHTS, np.float32, "r+", int(place["offset"]), shape=(int(place["length"]) // 4,)
    )
    weights += np.random.default_rng(0).normal(0, 4 * weights.std(), weights.shape).astype(np.float32)
    weights.flush()
    files = descriptions.read(output)["files"]
    files[bundle.WEIGHTS]["sha256"] = bundle.sha256(output / bundle.WEIGHTS)
    descriptions.change(output, files=files)
    return output


def check_full_agreement(report: dict[str, Any]) -> None:
    for each in report["bundles"]:
        assert set(each["tasks"]) == set(tasks.TASKS)
        for figures in (*each["tasks"].values(), each["overall"]):
            assert [figures[name] for name in SHARES] == [1, 1, 1]
            assert all(figures[name] in (None, 1) for name in ("text_similarity", "box_f1_50", "box_f1_90", "mask_iou"))
            assert figures["logit_top1"] == 1
            assert figures["logit_max_abs"] < 2e-3
        assert each["overall"]["num_boxes"] > 0
        assert each["overall"]["coordinate_shift"] == 0


def test_an_fp32_bundle_agrees_fully_with_its_checkpoint(tiny: Exported, tmp_path: Path) -> None:
    """Every task, greedy and with the checkpoint's three beams, on the built-in photograph."""
    output = tmp_path / "[report].json"
    source = tiny.bundle.parent / "checkpoint"
    bars = ("--min-token-agreement", "1", "--min-text-similarity", "1", "--max-logit-error", "0.002")
    done = run_verify_here(tiny.bundle, "--reference", source, *SHORT, *bars, "--json", output)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["reference"] == {"name": str(source), "kind": "checkpoint"}
    assert [each["num_beams"] for each in report["bundles"]] == [1, 3]
    assert report["failures"] == []
    for each in report["bundles"]:
        assert set(each["tasks"]) == set(tasks.TASKS)
        assert [each["overall"][name] for name in SHARES] == [1, 1, 1]
        assert 0 < each["overall"]["logit_max_abs"] < 2e-3, "another runtime rounds otherwise"
    assert "fp32, greedy" in done.stdout and "fp32, 3 beams" in done.stdout


def test_the_demo_agrees_fully_with_its_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A trained model has detections, so that boxes, polygons and words are compared too."""
    pytest.importorskip("torch", reason=NO_TORCH)
    from export.bundles.writer import export_bundle
    from export.checkpoints.checkpoint import load_checkpoint

    output = tmp_path_factory.mktemp("demo") / "fp32"
    export_bundle(load_checkpoint(DEMO_CHECKPOINT), output)
    arguments = ("--reference", DEMO_CHECKPOINT, "--images", SAMPLES, "--limit", "1", "--beams", "1", "--json", "-")
    done = run_verify_here(output, *arguments, "--min-box-f1", "1")
    assert done.returncode == 0, done.stderr
    assert "all tasks" in done.stderr, "JSON on standard output leaves the table to standard error"
    check_full_agreement(json.loads(done.stdout))


def test_a_damaged_bundle_is_told_from_a_sound_one(tiny: Exported, damaged: Path) -> None:
    arguments = ("--reference", tiny.bundle, *SHORT, "--beams", "1", "--task", "<OD>", "--task", "caption")
    done = run_verify(tiny.bundle, damaged, *arguments, "--json", "-", "--max-logit-error", "0.001")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    sound, bad = (each["overall"] for each in report["bundles"])
    assert report["reference"]["kind"] == "bundle"
    assert sound["logit_max_abs"] == 0 and sound["token_agreement"] == 1
    assert bad["logit_max_abs"] > 0.1
    assert bad["logit_top1"] < 1 and bad["token_agreement"] < 1 and bad["token_similarity"] < 1
    assert [line for line in done.stderr.splitlines() if line.startswith("below the bar")] == [
        f"below the bar: {line}" for line in report["failures"]
    ]
    assert all(str(damaged) in line for line in report["failures"]) and len(report["failures"]) == 2
    without_bar = run_verify(damaged, *arguments)
    assert without_bar.returncode == 0, without_bar.stderr


def test_every_image_size_has_its_agreement_and_time(sized: Exported) -> None:
    """The reference reads images at its own size, so that smaller sizes show what they cost."""
    source = sized.bundle.parent / "checkpoint"
    arguments = ("--reference", source, *SHORT, "--beams", "1", "--task", "caption", "--device", "cpu")
    done = run_verify_here(sized.bundle, *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["bundles"]
    assert [each["image_size"] for each in found] == [list(size) for size in SIZES]
    assert [each["bundle"] for each in found] == [f"{sized.bundle}, {width}x{height}" for width, height in SIZES]
    assert all(0 < each["seconds"][name] < 60 for each in found for name in ("vision_seconds", "decoding_seconds"))
    own, *others = (each["overall"] for each in found)
    assert own["exact"] == 1 and own["logit_max_abs"] < 2e-3
    assert all(other["logit_max_abs"] > 0.1 for other in others), "at other sizes a random model sees other things"
    assert "in ms" in done.stderr and "64x64" in done.stderr
    one = run_verify_here(sized.bundle, *arguments, "--json", "-", "--image-size", "64")
    assert [each["image_size"] for each in json.loads(one.stdout)["bundles"]] == [[64, 64]]
    wrong = run_verify_here(sized.bundle, *arguments, "--image-size", "65")
    assert wrong.returncode == 2 and "reads images of 128x128, 64x64, 160x96 pixels, not 65x65" in wrong.stderr


def test_the_reference_may_be_a_bundle_without_torch_installed(tiny: Exported) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['onnx'] = None\n"
        f"sys.argv[1:] = ['verify', {str(tiny.bundle)!r}, '--reference', {str(tiny.bundle)!r}, '--task', 'ocr',"
        " '--max-new-tokens', '4']\n"
        "from export.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "objects"), "unknown task 'objects'"),
        (("--images", "[nowhere]"), "[nowhere] is not a folder"),
        (("--beams", "0"), "num_beams must be a whole number from 1"),
        (("--max-new-tokens", "99999"), "max_new_tokens must be"),
        (("--min-box-f1", "50"), "--min-box-f1"),
        (("--limit", "0"), "--limit"),
        (("--precision", "int3"), "has precision fp32, not int3"),
        (("--reference", "[nothing]"), "[nothing]"),
    ],
)
def test_bad_arguments_end_with_2_and_a_reason(tiny: Exported, arguments: tuple[str, str], message: str) -> None:
    done = run_verify_here(tiny.bundle, "--reference", tiny.bundle, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_only_fp32_is_a_reference_and_only_a_bundle_is_measured(tiny: Exported, tiny_fp16: Exported) -> None:
    done = run_verify(tiny.bundle, "--reference", tiny_fp16.bundle)
    assert done.returncode == 2 and "has precision fp16; give the checkpoint" in done.stderr
    done = run_verify(tiny.bundle.parent / "checkpoint", "--reference", tiny.bundle)
    assert done.returncode == 2 and "looks like a PyTorch checkpoint" in done.stderr
    assert run_verify(tiny.bundle).returncode == 2, "a reference is needed"


def test_models_of_other_vocabularies_are_not_compared(tiny: Exported) -> None:
    done = run_verify(tiny.bundle, "--reference", "demo", "--task", "ocr")
    assert done.returncode == 2 and "precision fp16" in done.stderr
    done = run_verify("demo", "--reference", tiny.bundle, "--task", "ocr", "--max-new-tokens", "4")
    assert done.returncode == 2 and "do not come from the same checkpoint" in done.stderr


def test_a_bundle_is_told_from_a_checkpoint(tiny: Exported) -> None:
    assert is_bundle(str(tiny.bundle)) and is_bundle("demo")
    assert not is_bundle(str(tiny.bundle.parent / "checkpoint"))
    assert not is_bundle("microsoft/Florence-2-base")


def test_of_several_bundles_the_reference_is_the_fp32_one(tiny: Exported, tiny_fp16: Exported, tmp_path: Path) -> None:
    for precision, exported in (("fp32", tiny), ("fp16", tiny_fp16)):
        shutil.copytree(exported.bundle, tmp_path / precision)
    assert is_bundle(str(tmp_path))
    generation = bundle.read(tiny.bundle).generation
    assert open_reference(str(tmp_path), generation, device="cpu").precision == "fp32"
    shutil.rmtree(tmp_path / "fp32")
    with pytest.raises(BundleFormatError, match="has precisions fp16, not fp32"):
        open_reference(str(tmp_path), generation, device="cpu")


def test_a_checkpoint_called_verify_is_exported_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "verify").mkdir()
    command = [sys.executable, "-m", "export", str(tmp_path / "verify"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "config.json" in done.stderr


# --- images and questions ----------------------------------------------------------------------------------------


def test_images_are_found_below_a_folder_by_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.png", "b/a.jpg", "a.bmp"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    found, others = find_images(tmp_path)
    assert [path.name for path in found] == ["a.bmp", "a.jpg", "c.png"]
    assert [path.name for path in others] == ["notes.txt"]
    assert [path.name for path in find_images(tmp_path, 1)[0]] == ["a.bmp"]
    with pytest.raises(InputError, match="has no readable image among its 0 files"):
        (tmp_path / "empty").mkdir()
        find_images(tmp_path / "empty")


def ask_with(answers: dict[str, str]) -> Any:
    def ask(question: Question) -> Answer:
        text = answers.get(question.task.slug, "")
        return Answer((2, 2), text, parse(question.task, text, question.image.size), question.image.size)

    return ask


def test_questions_are_made_of_what_the_reference_sees() -> None:
    image = NamedImage("blank", Image.new("RGB", (200, 100)))
    answers = {"caption": "</s><s>A cat.</s>", "object-detection": "cat<loc_10><loc_20><loc_300><loc_400>"}
    asked = {each.task.slug: each for each in make_questions(image, list(tasks.TASKS.values()), ask_with(answers))}
    assert list(asked) == list(tasks.TASKS)
    assert asked["caption-to-phrase-grounding"].text_input == "A cat."
    assert asked["open-vocabulary-detection"].text_input == "cat"
    assert asked["region-to-ocr"].prompt == "What text is in the region <loc_10><loc_20><loc_300><loc_400>?"


def test_questions_about_nothing_have_defaults_and_babble_is_cut() -> None:
    image = NamedImage("blank", Image.new("RGB", (200, 100)))
    needy = [tasks.OPEN_VOCABULARY_DETECTION, tasks.CAPTION_TO_PHRASE_GROUNDING, tasks.REGION_TO_OCR]
    first, second, third = make_questions(image, needy, ask_with({}))
    assert (first.text_input, second.text_input, third.region) == (DEFAULT_TEXT, DEFAULT_TEXT, DEFAULT_REGION)
    for babble in ("word " * 300, "x" * 300):
        (question,) = make_questions(image, needy[1:2], ask_with({"caption": babble}))
        assert question.text_input and 90 <= len(question.text_input) <= 100


# --- the runtime's part --------------------------------------------------------------------------------------------


def test_score_tokens_expects_what_greedy_search_chose(tiny: Exported) -> None:
    model = Florence2.from_pretrained(tiny.bundle, device="cpu")
    image = Image.new("RGB", (60, 40), (200, 30, 90))
    options = GenerationOptions(1, 10, no_repeat_ngram_size=0, forced_bos_token_id=-1, forced_eos_token_id=-1)
    answer = model.run(tasks.CAPTION, image, options=options)
    logits = model.score_tokens(tasks.CAPTION, image, answer.token_ids)
    assert logits.shape == (len(answer.token_ids) - 1, bundle.read(tiny.bundle).sizes.vocab_size)
    assert tuple(logits.argmax(axis=1)) == answer.token_ids[1:]


def test_score_tokens_equals_transformers(tiny: Exported) -> None:
    from export.verification import reference
    from florence_onnx.images import preprocessing

    model = Florence2.from_pretrained(tiny.bundle, device="cpu")
    image = Image.new("RGB", (60, 40), (200, 30, 90))
    inputs = tiny.checkpoint.preprocessing
    pixels = preprocessing.preprocess(image, size=inputs.image_size, mean=inputs.image_mean, std=inputs.image_std)
    token_ids = (2, 0, 40, 41, 300, 7, 2)
    encoded = reference.encode(tiny.checkpoint, pixels, [tasks.OCR.format_prompt()])
    expected = reference.score(tiny.checkpoint, encoded, token_ids)
    np.testing.assert_allclose(model.score_tokens("ocr", image, token_ids), expected, atol=2e-3)


@pytest.mark.parametrize("token_ids", [(), (2, 10**6), (-1, 2), (2,) * 5000])
def test_score_tokens_refuses_what_is_no_answer(tiny: Exported, token_ids: tuple[int, ...]) -> None:
    model = Florence2.from_pretrained(tiny.bundle, device="cpu")
    with pytest.raises(InputError, match="token_ids must be"):
        model.score_tokens("ocr", Image.new("RGB", (9, 9)), token_ids)


def test_words_of_a_region_answer_leave_out_the_region() -> None:
    assert words("</s><s>square<loc_1><loc_2><loc_3><loc_4></s>") == "square"
