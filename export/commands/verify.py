"""`python -m export verify BUNDLE… --reference CHECKPOINT`: how much bundles agree with fp32, on the user's own images.

Exit codes: 0 if every bar is reached, 1 if one is not, 2 for wrong arguments, or a model or file that cannot be read or
written.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from florence_onnx import tasks
from florence_onnx.bundles.bundle import parse_image_size
from florence_onnx.errors import FlorenceError, InputError
from florence_onnx.generation.options import GenerationOptions

from ..verification.agreement import Comparison
from ..verification.answerers import Answerer, BundleAnswerer, open_reference, open_sizes
from ..verification.comparison import compare_models, resolve_searches
from ..verification.photograph import PHOTOGRAPH
from ..verification.questions import Question, find_images, load_images, make_questions
from ..verification.report import Agreement, Bar, bundles_table, find_failures, make_agreement, tasks_table
from .arguments import AdapterOption, BaseOption, ProcessorOption, RevisionOption

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_Share = Annotated[float | None, typer.Option(min=0, max=1, help="From 0 to 1.")]


@app.callback()
def florence_onnx_export() -> None:
    """Measures exported bundles; `florence-onnx-export CHECKPOINT OUT` exports one."""


@app.command()
def verify(
    bundle: Annotated[
        list[str], typer.Argument(help="Bundle directories, hub repositories, or demo.", metavar="BUNDLE")
    ],
    reference: Annotated[
        str, typer.Option(help="What to compare with: a checkpoint (folder or hub id), or its fp32 bundle.")
    ],
    revision: RevisionOption = None,
    processor: ProcessorOption = None,
    adapter: AdapterOption = None,
    base: BaseOption = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images. Default: a built-in photograph.", metavar="DIR")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most images to use.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Slug or token; may be repeated. Default: all tasks.")] = None,
    beams: Annotated[
        list[int] | None,
        typer.Option(help="Beams; 1 is greedy; may be repeated. Default: 1 and the checkpoint's own number."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Which files to load if a bundle has several precisions.")
    ] = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option(
            help="Pixels at which a bundle of several image sizes reads images: the side of a square, or WIDTHxHEIGHT; may be "
            "repeated. Default: all its sizes, one after the other.",
            metavar="SIZE",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    json_file: Annotated[
        str | None, typer.Option("--json", help="Also write the figures as JSON; - is standard output.", metavar="FILE")
    ] = None,
    min_token_agreement: _Share = None,
    min_box_f1: Annotated[float | None, typer.Option(min=0, max=1, help="From 0 to 1, at IoU 0.5.")] = None,
    min_text_similarity: _Share = None,
    max_logit_error: Annotated[float | None, typer.Option(min=0, help="Largest absolute error.")] = None,
) -> None:
    """Measures how much bundles of any precision agree with fp32, task by task.

    A bundle of several image sizes answers at each of them; the reference always reads images at its own size. The time for
    an image and for an answer is measured too.

    Tasks with a text or region input get it from the reference's own answers: its caption, or its first detected
    object. Logits are compared along the reference's answer. Every task must reach every bar (--min-…, --max-…);
    otherwise the command exits with 1. Where the reference is a checkpoint, --revision, --processor, --adapter and
    --base mean for it what they mean for an export.
    """
    bars = _bars(min_token_agreement, min_box_f1, min_text_similarity, max_logit_error)
    try:
        asked = [tasks.get(name) for name in dict.fromkeys(task or tasks.TASKS)]
        named_images = _find(images, limit)
        sizes = [parse_image_size(each) for each in image_size or ()]
        candidates = [
            each
            for name in dict.fromkeys(bundle)
            for each in open_sizes(name, sizes, precision=precision, device=device)
        ]
        parts = {"revision": revision, "processor": processor, "adapter": adapter, "base": base}
        reference_model = open_reference(reference, candidates[0].generation, device=device, **parts)
        searches = resolve_searches(reference_model.generation, beams or (), max_new_tokens)
        questions = _questions(reference_model, named_images, asked, searches[0])
        agreements = _measure(reference_model, candidates, questions, searches)
        failures = find_failures(agreements, bars)
        _print_tables(agreements, to_stderr=json_file == "-")
        report = _report(reference_model, len(named_images), agreements, bars, failures)
        _write_json(report, json_file)
    except (FlorenceError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    for failure in failures:
        typer.echo(f"below the bar: {failure}", err=True)
    if failures:
        raise typer.Exit(1)


def _bars(tokens: float | None, boxes: float | None, texts: float | None, logits: float | None) -> list[Bar]:
    bars = (
        ("--min-token-agreement", "token_agreement", tokens, False),
        ("--min-box-f1", "box_f1_50", boxes, False),
        ("--min-text-similarity", "text_similarity", texts, False),
        ("--max-logit-error", "logit_max_abs", logits, True),
    )
    return [Bar(option, field, value, maximum) for option, field, value, maximum in bars if value is not None]


def _find(folder: Path | None, limit: int | None) -> list[Path]:
    if folder is None:
        return [PHOTOGRAPH]
    found, others = find_images(folder, limit)
    if others:
        typer.echo(f"not read as images: {len(others)} files, such as {others[0]}", err=True)
    return found


def _questions(
    reference_model: Answerer,
    named_images: Sequence[Path],
    asked: Sequence[tasks.Task[Any]],
    options: GenerationOptions,
) -> Iterator[Question]:
    console = Console(stderr=True)
    loaded = track(
        load_images(named_images), "images", total=len(named_images), console=console, disable=not console.is_terminal
    )
    for image in loaded:
        yield from make_questions(image, asked, lambda question: reference_model.answer(question, options))


def _measure(
    reference_model: Answerer,
    candidates: Sequence[BundleAnswerer],
    questions: Iterator[Question],
    searches: Sequence[GenerationOptions],
) -> list[Agreement]:
    found: dict[tuple[str, int], dict[str, list[Comparison]]] = defaultdict(lambda: defaultdict(list))
    for each in compare_models(reference_model, candidates, questions, searches):
        found[each.candidate.name, each.num_beams][each.question.task.slug].append(each.comparison)
    return [
        make_agreement(
            candidate.name,
            candidate.precision,
            num_beams,
            found[candidate.name, num_beams],
            image_size=candidate.image_size,
            timing=candidate.stopwatch.timing(num_beams),
        )
        for candidate in candidates
        for num_beams in (options.num_beams or 1 for options in searches)
    ]


def _print_tables(agreements: Sequence[Agreement], *, to_stderr: bool) -> None:
    stream = sys.stderr if to_stderr else sys.stdout
    # A pipe has no width; rich would wrap the rows at 80 columns.
    console = Console(file=stream, width=None if stream.isatty() else 200, markup=False, emoji=False, highlight=False)
    for agreement in agreements:
        console.print(tasks_table(agreement))
    if len(agreements) > 1:
        console.print(bundles_table(agreements))


def _report(
    reference_model: Answerer,
    num_images: int,
    agreements: Sequence[Agreement],
    bars: Sequence[Bar],
    failures: Sequence[str],
) -> dict[str, Any]:
    kind = "bundle" if isinstance(reference_model, BundleAnswerer) else "checkpoint"
    return {
        "reference": {"name": reference_model.name, "kind": kind},
        "num_images": num_images,
        "bundles": [agreement.to_dict() for agreement in agreements],
        "bars": {bar.option: bar.value for bar in bars},
        "failures": list(failures),
    }


def _write_json(report: dict[str, Any], file: str | None) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    if file == "-":
        typer.echo(text)
    elif file is not None:
        try:
            Path(file).write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {file}: {error.strerror}") from None


def main() -> None:
    """Runs the command line, whose first argument is `verify`."""
    app()
