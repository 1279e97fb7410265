"""The tasks of Florence-2: one constant per task, found by name, fal slug or token; and `parse`, which reads an answer.

```python
tasks.OBJECT_DETECTION              # Task[BoundingBoxes]
tasks.get("object-detection")       # the same, by fal's endpoint name
tasks.get("<OD>")                   # the same, by Microsoft's token
```

A fine-tuned checkpoint may have a task of its own, whose prompt usually starts with its token:

```python
VQA = Task("vqa", "<VQA>", "<VQA>{input}", needs="text", parser=postprocess.pure_text, has_image=False)
```

A bundle may carry such tasks (`florence_onnx.bundles.own_tasks`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar, get_args, overload

from florence_onnx.answers import postprocess
from florence_onnx.answers.locations import Region, Size
from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, PolygonOutput
from florence_onnx.errors import InputError, RegionError, TextInputError, UnknownTaskError

R = TypeVar("R")

Needs: TypeAlias = Literal["nothing", "text", "region", "text+region"]
"""What a task takes beside the image."""
NEEDS: tuple[Needs, ...] = get_args(Needs)

_PLACEHOLDERS: dict[Needs, tuple[str, ...]] = {
    "nothing": (),
    "text": ("{input}",),
    "region": ("{input}",),
    "text+region": ("{text}", "{region}"),
}


class FormattedInput(NamedTuple):
    """What a caller chose of a prompt, checked; empty where the task takes none."""

    text: str
    """The text, without white space around it."""
    location_tokens: str
    """The region as `<loc_x1><loc_y1><loc_x2><loc_y2>`."""


@dataclass(frozen=True)
class Task(Generic[R]):
    """A task that the model was trained on: how to prompt for it, and how to parse its answer into R.

    Raises:
        InputError: `needs` is unknown, or `prompt` does not contain each of its placeholders once.
    """

    slug: str
    """Name in URLs and on the command line: fal's endpoint name, such as "object-detection"."""
    token: str
    """Microsoft's name, such as "<OD>". Despite its look it is not in the vocabulary, and the model never reads it."""
    prompt: str
    """The text that the model reads; `{input}` is replaced with the text or the region's location tokens. A task that
    needs both has `{text}` and `{region}` instead."""
    needs: Needs
    """What the task takes beside the image: "nothing", "text", "region" or "text+region"."""
    parser: Callable[[str, Size], R]
    """Turns generated text and the image's (width, height) in pixels into results."""
    has_image: bool
    """Whether fal's JSON has an `image` (the annotated image) beside `results`."""
    description: str = ""
    """One sentence for people and assistants; empty for Florence-2's own tasks, which are described elsewhere."""

    def __post_init__(self) -> None:
        if self.needs not in NEEDS:
            raise InputError(f'Task needs "nothing", "text", "region" or "text+region", got {self.needs!r}')
        for placeholder in ("{input}", "{text}", "{region}"):
            expected = placeholder in self._placeholders
            # {text} and {region} are ordinary text in the prompt of a task that does not need both
            if self.prompt.count(placeholder) != expected and (expected or placeholder == "{input}"):
                raise InputError(
                    f"prompt {self.prompt!r} of task {self.slug!r} must contain {placeholder} "
                    f"{'once' if expected else 'nowhere'}, as the task needs {self.needs}: {{input}} stands for the "
                    "text or the region, {text} and {region} where it needs both"
                )

    @property
    def takes_text(self) -> bool:
        """Whether the task needs text."""
        return self.needs in ("text", "text+region")

    @property
    def takes_region(self) -> bool:
        """Whether the task needs a region."""
        return self.needs in ("region", "text+region")

    @property
    def _placeholders(self) -> tuple[str, ...]:
        return _PLACEHOLDERS[self.needs]

    def format_prompt(self, text_input: str | None = None, region: Region | str | None = None) -> str:
        """Checks the input and formats the prompt.

        Args:
            text_input: Text for a task that needs text; surrounding white space is removed. A task that needs a region
                and no text also takes the region from here, as location tokens.
            region: Region for a task that needs a region, or its location tokens: `<loc_52><loc_332><loc_932><loc_774>`.

        Returns:
            The prompt, ready for the tokenizer.

        Raises:
            TextInputError: The text is missing, blank or not a string, or the task takes none.
            RegionError: The region is missing or not a region, or the task takes none.
        """
        return self.fill_prompt(self.format_input(text_input, region))

    def fill_prompt(self, given: FormattedInput) -> str:
        """Puts an input, as `format_input` returned it, into the prompt."""
        values = {
            "{text}": given.text,
            "{region}": given.location_tokens,
            "{input}": given.text or given.location_tokens,
        }
        if not self._placeholders:
            return self.prompt
        # in one pass: a text that contains `{region}` stays as it is
        pattern = "|".join(map(re.escape, self._placeholders))
        return re.sub(pattern, lambda found: values[found[0]], self.prompt)

    def format_input(self, text_input: str | None = None, region: Region | str | None = None) -> FormattedInput:
        """Checks the input and formats it as it stands in the prompt; arguments and errors as for `format_prompt`."""
        if self.needs == "region" and region is None and isinstance(text_input, str):
            written = text_input.strip().removeprefix(self.token)
            if Region.is_text(written):
                text_input, region = None, written
        self._check_text(text_input)
        found = self._read_region(region)
        return FormattedInput("" if text_input is None else text_input.strip(), found.location_tokens if found else "")

    def _check_text(self, text_input: str | None) -> None:
        if not self.takes_text:
            if text_input is not None:
                raise TextInputError(
                    f"task {self.slug!r} takes no text_input, got {_shorten(text_input)}; leave it out"
                )
            return
        if text_input is None:
            raise TextInputError(f'task {self.slug!r} needs text: pass text_input="…"')
        if not isinstance(text_input, str):
            raise TextInputError(f"text_input must be a string, got {type(text_input).__name__}")
        if not text_input.strip():
            raise TextInputError(f"task {self.slug!r} needs text, and text_input={_shorten(text_input)} is blank")
        check_unicode("text_input", text_input)

    def _read_region(self, region: Region | str | None) -> Region | None:
        remedy = (
            "pass region=Region(x1, y1, x2, y2) in bins 0 to 999, region=Region.from_pixels(x1, y1, x2, y2, size), or "
            'location tokens: region="<loc_52><loc_332><loc_932><loc_774>"'
        )
        if not self.takes_region:
            if region is not None:
                raise RegionError(f"task {self.slug!r} takes no region, got {region!r}; leave it out")
            return None
        if region is None:
            raise RegionError(f"task {self.slug!r} needs a region: {remedy}")
        if isinstance(region, str):
            return Region.from_text(region)
        if not isinstance(region, Region):
            raise RegionError(f"region must be a Region, got {region!r}; {remedy}")
        return region


def check_unicode(name: str, text: str) -> None:
    """Refuses a lone surrogate, as in a file name that is not UTF-8; the tokenizer would raise an obscure TypeError.

    Args:
        name: What the text is, for the error.
        text: The text.

    Raises:
        TextInputError: There is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextInputError(f"{name}={_shorten(text)} is not valid Unicode: {error}") from error


CAPTION: Task[str] = Task(
    "caption", "<CAPTION>", "What does the image describe?", "nothing", postprocess.pure_text, has_image=False
)
"""One sentence about the image."""

DETAILED_CAPTION: Task[str] = Task(
    "detailed-caption",
    "<DETAILED_CAPTION>",
    "Describe in detail what is shown in the image.",
    "nothing",
    postprocess.pure_text,
    has_image=False,
)
"""A few sentences about the image."""

MORE_DETAILED_CAPTION: Task[str] = Task(
    "more-detailed-caption",
    "<MORE_DETAILED_CAPTION>",
    "Describe with a paragraph what is shown in the image.",
    "nothing",
    postprocess.pure_text,
    has_image=False,
)
"""A paragraph about the image."""

OCR: Task[str] = Task(
    "ocr", "<OCR>", "What is the text in the image?", "nothing", postprocess.pure_text, has_image=False
)
"""The text in the image, as one string."""

OCR_WITH_REGION: Task[OCRBoundingBox] = Task(
    "ocr-with-region",
    "<OCR_WITH_REGION>",
    "What is the text in the image, with regions?",
    "nothing",
    postprocess.ocr,
    has_image=True,
)
"""Each line of text in the image with its quadrilateral."""

OBJECT_DETECTION: Task[BoundingBoxes] = Task(
    "object-detection",
    "<OD>",
    "Locate the objects with category name in the image.",
    "nothing",
    postprocess.description_with_bboxes,
    has_image=True,
)
"""Boxes of the objects, labelled with their category."""

DENSE_REGION_CAPTION: Task[BoundingBoxes] = Task(
    "dense-region-caption",
    "<DENSE_REGION_CAPTION>",
    "Locate the objects in the image, with their descriptions.",
    "nothing",
    postprocess.description_with_bboxes,
    has_image=True,
)
"""Boxes of the objects, labelled with a short description."""

REGION_PROPOSAL: Task[BoundingBoxes] = Task(
    "region-proposal",
    "<REGION_PROPOSAL>",
    "Locate the region proposals in the image.",
    "nothing",
    postprocess.bboxes,
    has_image=True,
)
"""Boxes of salient objects, without labels."""

CAPTION_TO_PHRASE_GROUNDING: Task[BoundingBoxes] = Task(
    "caption-to-phrase-grounding",
    "<CAPTION_TO_PHRASE_GROUNDING>",
    "Locate the phrases in the caption: {input}",
    "text",
    postprocess.phrase_grounding,
    has_image=True,
)
"""Boxes of the things that a caption mentions; the text is the caption."""

REFERRING_EXPRESSION_SEGMENTATION: Task[PolygonOutput] = Task(
    "referring-expression-segmentation",
    "<REFERRING_EXPRESSION_SEGMENTATION>",
    "Locate {input} in the image with mask",
    "text",
    postprocess.polygons,
    has_image=True,
)
"""Outlines of what the text refers to."""

REGION_TO_SEGMENTATION: Task[PolygonOutput] = Task(
    "region-to-segmentation",
    "<REGION_TO_SEGMENTATION>",
    "What is the polygon mask of region {input}",
    "region",
    postprocess.polygons,
    has_image=True,
)
"""Outlines of the object in a region."""

OPEN_VOCABULARY_DETECTION: Task[BoundingBoxes] = Task(
    "open-vocabulary-detection",
    "<OPEN_VOCABULARY_DETECTION>",
    "Locate {input} in the image.",
    "text",
    postprocess.description_with_bboxes_or_polygons,
    has_image=True,
)
"""Boxes (or, rarely, outlines) of what the text names."""

REGION_TO_CATEGORY: Task[str] = Task(
    "region-to-category",
    "<REGION_TO_CATEGORY>",
    "What is the region {input}?",
    "region",
    postprocess.pure_text,
    has_image=False,
)
"""The category of the object in a region, followed by the region's location tokens."""

REGION_TO_DESCRIPTION: Task[str] = Task(
    "region-to-description",
    "<REGION_TO_DESCRIPTION>",
    "What does the region {input} describe?",
    "region",
    postprocess.pure_text,
    has_image=False,
)
"""A description of the object in a region, followed by the region's location tokens."""

REGION_TO_OCR: Task[str] = Task(
    "region-to-ocr",
    "<REGION_TO_OCR>",
    "What text is in the region {input}?",
    "region",
    postprocess.pure_text,
    has_image=False,
)
"""The text in a region, followed by the region's location tokens."""

TASKS: dict[str, Task[Any]] = {
    task.slug: task
    for task in (
        OBJECT_DETECTION,
        DENSE_REGION_CAPTION,
        REGION_PROPOSAL,
        OPEN_VOCABULARY_DETECTION,
        CAPTION_TO_PHRASE_GROUNDING,
        OCR_WITH_REGION,
        REFERRING_EXPRESSION_SEGMENTATION,
        REGION_TO_SEGMENTATION,
        CAPTION,
        DETAILED_CAPTION,
        MORE_DETAILED_CAPTION,
        OCR,
        REGION_TO_CATEGORY,
        REGION_TO_DESCRIPTION,
        REGION_TO_OCR,
    )
}
"""All tasks by slug: fal's fourteen in the order of its catalogue, then region-to-ocr."""


def get(task: Task[Any] | str, own: Mapping[str, Task[Any]] | None = None) -> Task[Any]:
    """Finds a task.

    Args:
        task: A task, which is returned as it is (also one of your own), a slug ("object-detection") or a token
            ("<OD>").
        own: Further tasks by slug, such as those of a bundle.

    Returns:
        The task.

    Raises:
        UnknownTaskError: There is no such task; the message lists all tasks and the nearest name.
    """
    if isinstance(task, Task):
        return task
    known = [*TASKS.values(), *(own or {}).values()]
    by_name = {**{each.slug: each for each in known}, **{each.token: each for each in known}}
    found = by_name.get(task) if isinstance(task, str) else None
    if found is None:
        listed = ", ".join(f"{each.slug} ({each.token})" for each in known)
        raise UnknownTaskError(f"unknown task {task!r}{_suggestion(task, by_name)}; the tasks are: {listed}")
    return found


def _shorten(text: object) -> str:
    """A text as it stands in an error: at most 100 characters of it."""
    return repr(text) if not isinstance(text, str) or len(text) <= 100 else f"{text[:100]!r}…"


def _suggestion(task: object, names: Iterable[str]) -> str:
    """`; did you mean "object-detection"?`, or "" where no name is similar."""
    import difflib  # takes milliseconds to import, and only this error needs it

    by_plain_name = {_normalize(name): name for name in reversed(list(names))}  # a slug replaces an equal token
    near = difflib.get_close_matches(_normalize(str(task)[:100]), by_plain_name, n=1)
    return f'; did you mean "{by_plain_name[near[0]]}"?' if near else ""


def _normalize(name: str) -> str:
    """A slug or token without the differences in spelling that people get wrong."""
    return name.strip(" <>").lower().replace("_", "-").replace(" ", "-")


@overload
def parse(task: Task[R], text: str, size: Size) -> R: ...
@overload
def parse(task: str, text: str, size: Size) -> Any: ...
def parse(task: Task[Any] | str, text: str, size: Size) -> Any:
    """Parses the text that the model generated for a task.

    Args:
        task: A constant of `florence_onnx.tasks`, a task of your own, a slug ("object-detection") or a token ("<OD>").
        text: Generated text with its special and location tokens; any string is accepted.
        size: (width, height) of the image in pixels.

    Returns:
        BoundingBoxes, OCRBoundingBox, PolygonOutput or str, depending on the task.

    Raises:
        UnknownTaskError: No task has that slug or token.
        InputError: `size` is not two positive integers.
    """
    return get(task).parser(text, size)
