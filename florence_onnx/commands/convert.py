"""`florence-onnx convert`: rows of a batch job in the forms of other tools."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from florence_onnx.batch.outputs import read_rows
from florence_onnx.commands.arguments import exit_on_error
from florence_onnx.errors import InputError
from florence_onnx.forms.labelled import classify, of_rows, read_mapping
from florence_onnx.forms.writing import FORMS, Writing, write


def convert(
    results: Annotated[Path, typer.Argument(help="Rows of `batch`: a .jsonl file, or a folder of parts or shards.")],
    to: Annotated[str, typer.Option("--to", help=f"Form: {', '.join(FORMS)}.", metavar="FORM", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(help="File, or folder of a form with a file for each image.", metavar="OUT", show_default=False),
    ],
    task: Annotated[str | None, typer.Option(help="Task, where the rows are of several.", show_default=False)] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Classes in their order, with commas between them, or a file with one a line.  [default: all labels]",
            metavar="NAME,…|FILE",
            show_default=False,
        ),
    ] = None,
    mapping: Annotated[
        list[str] | None, typer.Option("--map", help="Class of another label; repeatable.", metavar="LABEL=CLASS")
    ] = None,
    unmapped: Annotated[
        str, typer.Option(help="Other labels, where classes are given: drop, keep (as further classes) or error.")
    ] = "drop",
    min_score: Annotated[
        float | None, typer.Option(help="Drop shapes of a lower score.", min=0, max=1, show_default=False)
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the images, for pdf and html.  [default: where the rows say]", show_default=False),
    ] = None,
    url_prefix: Annotated[
        str, typer.Option(help="For label-studio: what makes an address of a source, such as /data/local-files/?d=.")
    ] = "",
    rle: Annotated[bool, typer.Option("--rle", help="For coco: outlines as run lengths.")] = False,
    thumbnails: Annotated[bool, typer.Option("--thumbnails", help="For html: small images beside the page.")] = False,
    dpi: Annotated[float, typer.Option(help="For pdf: pixels of an image in an inch.", min=1)] = 150.0,
) -> None:
    """Write answers as COCO, YOLO, VOC, LabelMe, Label Studio, FiftyOne, CreateML, hOCR, ALTO, PAGE, PDF, CSV or a page of images."""
    with exit_on_error():
        if unmapped not in ("drop", "keep", "error"):
            raise typer.BadParameter(f"must be drop, keep or error, got {unmapped!r}", param_hint="--unmapped")
        found = list(of_rows(read_rows(results), task))
        if not found:
            raise InputError(f"{results} has no rows")
        kept, known, others = classify(
            found,
            _read_classes(classes),
            read_mapping(mapping or ()),
            unmapped,  # type: ignore[arg-type]  # checked above
            min_score,
        )
        notes = write(to, kept, known, Writing(out, images, url_prefix, rle, thumbnails, dpi))
    errors = sum(image.error is not None for image in kept)
    shapes = sum(len(image.shapes) for image in kept)
    typer.echo(
        f"{out}: {len(kept) - errors} images, {shapes} shapes, {len(known.names)} classes; {errors} rows have an error",
        err=True,
    )
    if others:
        listed = ", ".join(f"{name!r} ({count})" for name, count in islice(others.most_common(), 5))
        typer.echo(f"labels that are no class, {'dropped' if unmapped == 'drop' else 'kept'}: {listed}", err=True)
    for note in notes:
        typer.echo(note, err=True)


def _read_classes(given: str | None) -> list[str]:
    if given is None:
        return []
    path = Path(given)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else given.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a list of classes: {error}") from error
    names = [name.strip() for name in lines if name.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError("classes must be names, each once")
    return names
