"""Questions about a scene and their right answers, in Florence-2's prompts and answer formats, for all 15 tasks.

An answer is the text that the decoder should generate: plain text, or labels followed by location tokens of 1000 bins.
No template repeats a trigram, so `no_repeat_ngram_size=3` never forbids a right answer.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from florence_onnx import tasks
from florence_onnx.answers.locations import Region
from florence_onnx.tasks import TASKS

from .scenes import COLOURS, SHAPE_KINDS, Box, Scene, Shape, Word

NUM_BINS = 1000
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
SENTENCES = (
    "There is a {shape} at the {position}.",
    "One {shape} is at {position}.",
    "Then a {shape} follows near {position}.",
    "Finally, another {shape} sits in {position}.",
)
PROMPTS = {task.token: task.prompt for task in TASKS.values()}


@dataclass(frozen=True)
class Truth:
    """The ground truth that a prediction is compared with; fields that the task does not use are empty."""

    text: str = ""  # "red circle"
    boxes: tuple[tuple[str, Box], ...] = ()  # (("red circle", (0.1, 0.2, 0.3, 0.4)),), normalised
    shape: Shape | None = None  # the shape to be segmented


@dataclass(frozen=True)
class Question:
    """One task on one scene, with its right answer."""

    task: str  # "<OD>"
    text_input: str  # what follows the task token: "" or "a red circle" or "<loc_1><loc_2><loc_3><loc_4>"
    answer: str  # "red circle<loc_1><loc_2><loc_3><loc_4>"
    truth: Truth

    @property
    def region(self) -> Region | None:
        """The region input, or None if the task has none."""
        is_region = tasks.get(self.task).needs == "region"
        return Region(*map(int, re.findall(r"\d+", self.text_input))) if is_region else None

    @property
    def text(self) -> str | None:
        """The text input, or None if the task has none."""
        return self.text_input if tasks.get(self.task).needs == "text" else None

    @property
    def prompt(self) -> str:
        """The prompt that the text encoder reads."""
        return PROMPTS[self.task].replace("{input}", self.text_input)


def ask(scene: Scene, task: str, rng: random.Random, *, jitter: int = 6) -> Question | None:
    """Makes a question of one task about a scene.

    Args:
        scene: The scene.
        task: A task token such as `"<OD>"`.
        rng: Chooses the object or the phrase that is asked about.
        jitter: Largest error, in bins, of region inputs.

    Returns:
        The question, or None if the task does not apply to the scene (OCR of a region in a scene without a word).
    """
    return _ASKERS[task](scene, task, rng, jitter)


def quantize(value: float) -> int:
    """Quantizes a normalised coordinate to a bin 0..999."""
    return min(NUM_BINS - 1, max(0, int(value * NUM_BINS)))


def bins(values: Iterable[float]) -> list[int]:
    """Quantizes normalised coordinates to bins."""
    return [quantize(value) for value in values]


def locations(values: Iterable[int]) -> str:
    """Formats bins as location tokens: `"<loc_1><loc_2>"`."""
    return "".join(f"<loc_{value}>" for value in values)


def short_name(shape: Shape) -> str:
    """`"red circle"`."""
    return f"{shape.colour} {shape.kind}"


def full_name(shape: Shape) -> str:
    """`"small red circle"`."""
    return f"{shape.size} {shape.colour} {shape.kind}"


def caption(scene: Scene) -> str:
    """`"Two diamonds, a star and the word PIZZA."`; kinds in the order of their first shape."""
    counts = Counter(shape.kind for shape in scene.shapes)
    parts = [f"a {kind}" if n == 1 else f"{NUMBERS[n]} {kind}s" for kind, n in counts.items()]
    if scene.word:
        parts.append(f"the word {scene.word.text}")
    return _capitalised(_joined(parts)) + "."


def detailed_caption(scene: Scene) -> str:
    """`"The image shows two shapes: red circle and blue star on a dark background with the word PIZZA."`."""
    n = len(scene.shapes)
    names = _joined([short_name(shape) for shape in scene.shapes])
    ending = f" with the word {scene.word.text}." if scene.word else "."
    plural = "s" if n > 1 else ""
    return f"The image shows {NUMBERS[n]} shape{plural}: {names} on a {scene.background} background{ending}"


def more_detailed_caption(scene: Scene) -> str:
    """One sentence for each shape, one for the word, and one for the background."""
    sentences = [
        template.format(shape=full_name(shape), position=POSITIONS[shape.cell])
        for template, shape in zip(SENTENCES, scene.shapes, strict=False)
    ]
    word = scene.word
    if word:
        sentences.append(f"The word {word.text} is written in {word.ink} on {POSITIONS[word.cell]}.")
    return " ".join([*sentences, f"All on a {scene.background} background."])


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _phrase(thing: Shape | Word) -> str:
    return full_name(thing) if isinstance(thing, Shape) else f"the word {thing.text}"


def _region(box: Box, rng: random.Random, jitter: int) -> str:
    moved = [b + rng.randint(-jitter, jitter) for b in bins(box)]
    return locations(min(NUM_BINS - 1, max(0, b)) for b in moved)


def _grouped_answer(groups: list[tuple[str, list[Box]]]) -> tuple[str, Truth]:
    """Formats boxes as an answer in which each label occurs once, followed by all its boxes."""
    answer = "".join(label + "".join(locations(bins(box)) for box in boxes) for label, boxes in groups)
    return answer, Truth(boxes=tuple((label, box) for label, boxes in groups for box in boxes))


def _of_kind(scene: Scene, kind: str) -> list[Shape]:
    return [shape for shape in scene.shapes if shape.kind == kind]


def _ask_caption(scene: Scene, task: str, rng: random.Random, jitter: int) -> Question:
    writers = {
        "<CAPTION>": caption,
        "<DETAILED_CAPTION>": detailed_caption,
        "<MORE_DETAILED_CAPTION>": more_detailed_caption,
    }
    text = writers[task](scene)
    return Question(task, "", text, Truth(text))


def _ask_detection(scene: Scene, task: str, rng: random.Random, jitter: int) -> Question:
    groups: list[tuple[str, list[Box]]]
    if task == "<OD>":
        groups = [(short_name(shape), [shape.box]) for shape in scene.shapes]
    elif task == "<DENSE_REGION_CAPTION>":
        groups = [(_phrase(thing), [thing.box]) for thing in scene.things()]
    else:
        groups = [("", [thing.box]) for thing in scene.things()]
    return Question(task, "", *_grouped_answer(groups))


def _ask_grounding(scene: Scene, task: str, rng: random.Random, jitter: int) -> Question:
    """Asks to ground a caption of one to three phrases; "two circles" has two boxes."""
    namers = (short_name, full_name)
    shapes = list(scene.shapes)
    pool: list[tuple[str, list[Box]]] = []
    repeated = [kind for kind in SHAPE_KINDS if len(_of_kind(scene, kind)) > 1]
    if repeated and rng.random() < 0.4:
        kind = rng.choice(repeated)
        shapes = [shape for shape in shapes if shape.kind != kind]
        boxes = [shape.box for shape in _of_kind(scene, kind)]
        pool.append((f"{NUMBERS[len(boxes)]} {kind}s", boxes))
    pool += [("a " + rng.choice(namers)(shape), [shape.box]) for shape in shapes]
    if scene.word and rng.random() < 0.4:
        pool.append((f"the word {scene.word.text}", [scene.word.box]))
    rng.shuffle(pool)
    pool = pool[: rng.randint(1, 3)]
    text = _capitalised(_joined([phrase for phrase, _ in pool])) + "."
    pool[0] = (_capitalised(pool[0][0]), pool[0][1])
    return Question(task, text, *_grouped_answer(pool))


def _ask_open_vocabulary(scene: Scene, task: str, rng: random.Random, jitter: int) -> Question:
    """Asks for all boxes of a name. One name in eight is chosen at random and mostly absent from the scene."""
    dice = rng.random()
    if dice < 0.12:
        colour, kind = rng.choice(list(COLOURS)), rng.choice(SHAPE_KINDS)
        name = rng.choice((f"{colour} {kind}", kind))
        found = [shape for shape in scene.shapes if name in (short_name(shape), shape.kind)]
    elif dice < 0.45:
        name = rng.choice(scene.shapes).kind
        found = _of_kind(scene, name)
    else:
        shape = rng.choice(scene.shapes)
        name, found = rng.choice((short_name, full_name))(shape), [shape]
    name = rng.choice(("", "a ")) + name
    groups = [(name, [shape.box for shape in found])] if found else []
    return Question(task, name, *_grouped_answer(groups))


def _ask_segmentation(scene: Scene, task: str, rng: random.Random, jitter: int) -> Question:
    shape = rng.choice(scene.shapes)
    if task == "<REGION_TO_SEGMENTATION>":
        text_input = _region(shape.box, rng, jitter)
    else:
        names = [short_name(shape), full_name(shape)]
        if len(_of_kind(scene, shape.kind)) == 1:
            names.append(shape.kind)
        text_input = rng.choice(("a ", "the ", "")) + rng.choice(names)
    answer = locations(bins(value for point in shape.outline() for value in point))
    return Question(task, text_input, answer, Truth(shape=shape))


def _ask_region(scene: Scene, task: str, rng: random.Random, jitter: int) -> Question:
    """Asks for the name of the object in a region. As in Florence-2, the answer repeats the region."""
    thing = rng.choice(scene.things())
    region = _region(thing.box, rng, jitter)
    category = thing.kind if isinstance(thing, Shape) else "word"
    name = category if task == "<REGION_TO_CATEGORY>" else _phrase(thing)
    return Question(task, region, name + region, Truth(name))


def _ask_region_text(scene: Scene, task: str, rng: random.Random, jitter: int) -> Question | None:
    if not scene.word:
        return None
    return Question(task, _region(scene.word.box, rng, jitter), scene.word.text, Truth(scene.word.text))


def _ask_text(scene: Scene, task: str, rng: random.Random, jitter: int) -> Question:
    """Asks for the word, with its quad box for `<OCR_WITH_REGION>`; the answer is empty if the scene has no word."""
    word = scene.word
    if not word:
        return Question(task, "", "", Truth())
    x0, y0, x1, y1 = bins(word.box)
    quad = locations((x0, y0, x1, y0, x1, y1, x0, y1)) if task == "<OCR_WITH_REGION>" else ""
    return Question(task, "", word.text + quad, Truth(word.text, ((word.text, word.box),)))


_ASKERS: dict[str, Callable[[Scene, str, random.Random, int], Question | None]] = {
    "<CAPTION>": _ask_caption,
    "<DETAILED_CAPTION>": _ask_caption,
    "<MORE_DETAILED_CAPTION>": _ask_caption,
    "<OD>": _ask_detection,
    "<DENSE_REGION_CAPTION>": _ask_detection,
    "<REGION_PROPOSAL>": _ask_detection,
    "<CAPTION_TO_PHRASE_GROUNDING>": _ask_grounding,
    "<REFERRING_EXPRESSION_SEGMENTATION>": _ask_segmentation,
    "<REGION_TO_SEGMENTATION>": _ask_segmentation,
    "<OPEN_VOCABULARY_DETECTION>": _ask_open_vocabulary,
    "<REGION_TO_CATEGORY>": _ask_region,
    "<REGION_TO_DESCRIPTION>": _ask_region,
    "<REGION_TO_OCR>": _ask_region_text,
    "<OCR>": _ask_text,
    "<OCR_WITH_REGION>": _ask_text,
}
TASK_TOKENS = tuple(_ASKERS)
