"""Checking published checkpoints: export, comparison with transformers, comparison with published answers.

A checkpoint that fails is a row and does not stop the others. A checkpoint is finished when nothing of it remains to be
tried; what was finished is not done again after an interruption.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from florence_onnx.bundles.bundle import Bundle
from florence_onnx.errors import FlorenceError, ImageError, VerificationError
from florence_onnx.images import decoding
from florence_onnx.model import Florence2
from florence_onnx.runtime.load_options import LoadOptions

from ..bundles.writer import export_bundle
from ..checkpoints.checkpoint import load_checkpoint
from ..verification.answerers import Answerer, BundleAnswerer, CheckpointAnswerer
from ..verification.questions import NamedImage, Question
from .answers import Published, PublishedAnswer
from .downloads import find_shortage, make_plan, remove_download
from .images import FoundImage, find_image
from .journal import Journal
from .rows import EXPORT, Row, is_finished

_log = logging.getLogger("florence_onnx")


@dataclass(frozen=True)
class Settings:
    """How a check is done."""

    work: Path
    """The folder for downloads of images, exports and the journal."""
    images: Path | None = None
    """A folder with images under their published names."""
    keep: bool = False
    """Whether downloads and exports stay."""
    progress: Callable[[str], None] = lambda line: None
    """Called with a line before each step."""


def targets(published: Published, asked: Sequence[str]) -> list[str]:
    """The checkpoints to check, as `owner/name` or `owner/name@revision`; all that have answers if none is asked for."""
    known = dict.fromkeys(_target(answer) for answer in published.answers)
    return list(dict.fromkeys(asked)) or list(known)


def _target(answer: PublishedAnswer) -> str:
    return answer.checkpoint if answer.revision is None else f"{answer.checkpoint}@{answer.revision}"


def check(published: Published, wanted: Sequence[str], settings: Settings) -> Iterator[Row]:
    """Checks checkpoints one by one.

    Args:
        published: Answers and images.
        wanted: What `targets` returned. A checkpoint without published answers is compared with transformers only.
        settings: How.

    Yields:
        The rows of each checkpoint, when it is done.

    Raises:
        InputError: The working folder cannot be used.
    """
    journal = Journal(settings.work)
    is_complete = True
    for target in wanted:
        answers = [answer for answer in published.answers if _target(answer) == target]
        checkpoint = target.partition("@")[0]
        rows = journal.rows(target, answers)
        if rows is None:
            rows = _check_guarded(target, published, answers, settings, journal)
            if is_finished(rows):
                journal.finish(target, answers, rows)
        else:
            settings.progress(f"{target}: done before, not repeated")
        if is_finished(rows) and not settings.keep and journal.has_downloaded(checkpoint):
            remove_download(checkpoint)
        is_complete &= is_finished(rows)
        yield from rows
    if is_complete and not settings.keep:
        journal.remove()
    else:
        settings.progress(f"kept: {settings.work}; the same command tries again what could not be tried")


def _check_guarded(
    target: str, published: Published, answers: Sequence[PublishedAnswer], settings: Settings, journal: Journal
) -> list[Row]:
    """The rows of a checkpoint; what nobody foresaw is one of them, so that the other checkpoints are still tried."""
    checkpoint, _, revision = target.partition("@")
    plan = make_plan(checkpoint, revision or None)
    settings.progress(f"to download: {plan}")
    if not plan.is_cached:
        journal.note_download(checkpoint)
    exports = settings.work / "exports" / checkpoint.replace("/", "--")
    try:
        shortage = find_shortage(plan, settings.work)
        if shortage is not None:
            return _untried(target, shortage, answers)
        rows = list(_check_checkpoint(target, published, answers, settings, exports))
    except Exception as error:  # noqa: BLE001 - a row of its own, with the traceback in the log
        _log.exception("checking %s", target)
        rows = _untried(target, f"{type(error).__name__}: {_line(error)}; please report it", answers)
    if not settings.keep:
        shutil.rmtree(exports, ignore_errors=True)
    return rows


def _check_checkpoint(
    target: str, published: Published, answers: Sequence[PublishedAnswer], settings: Settings, output: Path
) -> Iterator[Row]:
    checkpoint, _, revision = target.partition("@")
    try:
        settings.progress(f"{target}: downloading and loading")
        loaded = load_checkpoint(checkpoint, revision=revision or None)
        bundle = export_bundle(loaded, output, force=True, progress=lambda step: settings.progress(f"{target}: {step}"))
    except VerificationError as error:
        yield Row(target, EXPORT, "disagrees", _line(error))
        yield from _untried(target, "the export does not reproduce the checkpoint", answers)[1:]
        return
    except (FlorenceError, OSError) as error:
        yield from _untried(target, _line(error), answers)
        return
    yield Row(target, EXPORT, "agrees", _describe_export(bundle))
    ours = BundleAnswerer(target, bundle, Florence2.from_bundle(bundle, LoadOptions(device="cpu")))
    theirs = CheckpointAnswerer(target, loaded, bundle.generation)
    for answer in answers:
        settings.progress(f"{target}: {_name(answer)}")
        yield _check_answer(target, published, answer, settings, (ours, theirs))


def _check_answer(
    target: str,
    published: Published,
    answer: PublishedAnswer,
    settings: Settings,
    models: tuple[Answerer, Answerer],
) -> Row:
    row = Row(target, _name(answer), "not tried", "", answer.source, answer.image)
    try:
        image = find_image(published.images[answer.image], settings.images, settings.work / "images")
        row = replace(row, image_sha256=image.sha256, is_image_known=image.is_known)
        return _compare(row, answer, image, models)
    except ImageError as error:
        return replace(row, detail=_line(error))
    except (FlorenceError, OSError) as error:
        return replace(row, detail=f"{type(error).__name__}: {_line(error)}")


def _compare(row: Row, answer: PublishedAnswer, image: FoundImage, models: tuple[Answerer, Answerer]) -> Row:
    named = NamedImage(answer.image, decoding.load(image.path, apply_exif=False))
    question = Question(answer.task, named, answer.text_input, answer.region)
    ours, theirs = (model.answer(question, answer.options) for model in models)
    difference = answer.compare(ours.text)
    if ours.token_ids != theirs.token_ids:
        said = difference or "the text is the published one"
        return replace(row, verdict="disagrees", detail=f"other tokens than transformers gives here; {said}")
    if difference is None:
        num_tokens = len(ours.token_ids)
        return replace(row, verdict="agrees", detail=f"as published, {num_tokens} tokens as transformers gives here")
    detail = f"{difference}; transformers gives the same as this package here"
    if answer.caveat is not None:
        return replace(row, verdict="unsettled", detail=f"{detail}; {answer.caveat}")
    return replace(row, verdict="disagrees", detail=detail)


def _untried(target: str, reason: str, answers: Sequence[PublishedAnswer]) -> list[Row]:
    """The row of an export that could not be tried, then one for each published answer."""
    first = Row(target, EXPORT, "not tried", reason)
    rest = [
        Row(target, _name(answer), "not tried", "there is no export to ask", answer.source, answer.image)
        for answer in answers
    ]
    return [first, *rest]


def _name(answer: PublishedAnswer) -> str:
    given = f" {answer.text_input!r}" if answer.text_input else ""
    return f"{answer.task.slug}{given}, {answer.image}"


def _describe_export(bundle: Bundle) -> str:
    tokens = bundle.verification["tokens"]
    said = ", ".join(f"{name} {found['equal']} of {found['total']}" for name, found in tokens.items())
    return f"fp32, tokens as transformers {bundle.verification['versions']['transformers']}: {said}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
