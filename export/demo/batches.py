"""Training batches: scenes, dense targets of the image tokens and tokenised questions, made by one producer process.

The batch of a step depends on the seed and the step number only.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image
from tokenizers import Tokenizer

from .architecture import GRID, IMAGE_SIZE
from .questions import NUMBERS, Question, ask, bins
from .scenes import BACKGROUNDS, COLOURS, DIAMETERS, LETTERS, SHAPE_KINDS, Box, Scene, Shape, Word, make_scene
from .settings import TrainingSettings
from .tokenizer import BOS_ID, EOS_ID, PAD_ID

Array = np.ndarray
KIND_OF_WORD = 1 + len(SHAPE_KINDS)
PROMPT_MULTIPLE, ANSWER_MULTIPLE = 16, 8  # every new tensor shape costs oneDNN a new kernel, dearer than the padding
QUEUE_LENGTH = 12


@dataclass(frozen=True)
class Targets:
    """Dense targets of N images on the G x G image tokens; -1 where a token has none."""

    kind: Array  # (N, G, G) 0 background, 1-5 shape, 6 word
    colour: Array  # (N, G, G)
    size: Array  # (N, G, G)
    peers: Array  # (N, G, G) shapes of the same kind in the scene, less one
    box: Array  # (N, G, G, 4) bins
    letter: Array  # (N, G, 2G) per half token: 0 none, 1-26
    letter_index: Array  # (N, G, 2G) place of the letter in its word
    background: Array  # (N, G, G) tone of the background
    ink: Array  # (N, G, G) 1 where the word is white
    counts: Array  # (N, 5) shapes of each kind in the scene, for the pooled token


@dataclass(frozen=True)
class QuestionGroup:
    """Questions of similar answer length."""

    image_index: Array  # (M,) into the images of the batch
    input_ids: Array  # (M, T), padded with 1
    labels: Array  # (M, L), padded with 1


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    step: int
    images: Array  # uint8 (N, 128, 128, 3)
    targets: Targets
    groups: tuple[QuestionGroup, ...]  # none in a vision step


def make_batch(settings: TrainingSettings, tokenizer: Tokenizer, step: int) -> Batch:
    """Draw the batch of a step."""
    rng = random.Random(f"{settings.seed}:{step}")
    is_joint = step >= settings.vision_steps
    scenes = [make_scene(rng) for _ in range(settings.images_per_step * (1 if is_joint else 2))]
    images = np.stack([shrink(scene.image) for scene in scenes])
    groups = _question_groups(settings, tokenizer, scenes, rng) if is_joint else ()
    return Batch(step, images, make_targets(scenes), groups)


def stream_batches(settings: TrainingSettings, tokenizer: Tokenizer, first_step: int) -> Iterator[Batch]:
    """Batches of all steps from `first_step`, drawn ahead by a second process."""
    context = mp.get_context("fork")
    queue = context.Queue(QUEUE_LENGTH)
    process = context.Process(target=_produce, args=(queue, settings, tokenizer, first_step), daemon=True)
    process.start()
    try:
        for _ in range(first_step, settings.total_steps):
            yield queue.get()
    finally:
        process.terminate()


def shrink(image: Image.Image) -> Array:
    """The image at the model's input size: uint8 (128, 128, 3)."""
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def number_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the words that depend on a count: `a`, `two`, `Three`, … and the plural kinds."""
    numbers = ("a", *NUMBERS[1:])
    words = [
        *numbers,
        *(f" {n}" for n in numbers),
        *(n.capitalize() for n in numbers),
        *(f" {k}s" for k in SHAPE_KINDS),
    ]
    encoded = (tokenizer.encode(word, add_special_tokens=False).ids for word in words)
    return sorted({ids[0] for ids in encoded if len(ids) == 1})


def make_targets(scenes: list[Scene]) -> Targets:
    """Dense targets of some scenes."""
    n = len(scenes)
    cells, halves = (n, GRID, GRID), (n, GRID, 2 * GRID)
    targets = Targets(
        kind=np.zeros(cells, np.int64),
        colour=np.full(cells, -1, np.int64),
        size=np.full(cells, -1, np.int64),
        peers=np.full(cells, -1, np.int64),
        box=np.full((*cells, 4), -1, np.int64),
        letter=np.zeros(halves, np.int64),
        letter_index=np.full(halves, -1, np.int64),
        background=np.full(cells, -1, np.int64),
        ink=np.full(cells, -1, np.int64),
        counts=np.array([[_count(scene, kind) for kind in SHAPE_KINDS] for scene in scenes], np.int64),
    )
    for i, scene in enumerate(scenes):
        if scene.word:
            _mark_word(targets, i, scene.word)
        for shape in scene.shapes:
            _mark_shape(targets, i, shape, _count(scene, shape.kind))
        tone = list(BACKGROUNDS).index(scene.background)
        targets.background[i] = np.where(targets.kind[i] == 0, tone, -1)
    return targets


def _produce(queue: "mp.Queue[Batch]", settings: TrainingSettings, tokenizer: Tokenizer, first_step: int) -> None:
    os.nice(3)
    torch.set_num_threads(1)
    for step in range(first_step, settings.total_steps):
        queue.put(make_batch(settings, tokenizer, step))
    queue.close()
    queue.join_thread()


def _count(scene: Scene, kind: str) -> int:
    return sum(shape.kind == kind for shape in scene.shapes)


def _covered(box: Box) -> tuple[slice, slice]:
    """Rows and columns of the tokens whose centres are inside a box; at least one."""
    x0, y0, x1, y1 = (v * GRID - 0.5 for v in box)
    columns, rows = _span(x0, x1), _span(y0, y1)
    return rows, columns


def _span(low: float, high: float) -> slice:
    first, last = int(np.ceil(low)), int(np.ceil(high))
    if first >= last:
        first = int((low + high) / 2 + 0.5)
        last = first + 1
    return slice(first, last)


def _mark_shape(targets: Targets, i: int, shape: Shape, num_of_kind: int) -> None:
    place = (i, *_covered(shape.box))
    targets.kind[place] = 1 + SHAPE_KINDS.index(shape.kind)
    targets.colour[place] = list(COLOURS).index(shape.colour)
    targets.size[place] = list(DIAMETERS).index(shape.size)
    targets.peers[place] = num_of_kind - 1
    targets.box[place] = bins(shape.box)


def _mark_word(targets: Targets, i: int, word: Word) -> None:
    """The word on the one row of tokens through its middle, its letters on half tokens."""
    row = min(GRID - 1, int((word.box[1] + word.box[3]) / 2 * GRID))
    place = (i, row, _covered(word.box)[1])
    targets.kind[place] = KIND_OF_WORD
    targets.box[place] = bins(word.box)
    targets.ink[place] = int(word.ink == "white")
    for index, (letter, centre) in enumerate(zip(word.text, word.letter_centres, strict=True)):
        half = min(2 * GRID - 1, int(centre * 2 * GRID))
        if targets.letter[i, row, half] == 0:
            targets.letter[i, row, half] = 1 + LETTERS.index(letter)
            targets.letter_index[i, row, half] = index


def _question_groups(
    settings: TrainingSettings, tokenizer: Tokenizer, scenes: list[Scene], rng: random.Random
) -> tuple[QuestionGroup, ...]:
    """All questions of a batch, in two halves by answer length."""
    rows = []
    for i, scene in enumerate(scenes):
        for question in _sample_questions(settings, scene, rng):
            rows.append((i, _encode(tokenizer, question.prompt), _encode(tokenizer, question.answer)))
    rows.sort(key=lambda row: len(row[2]))
    half = len(rows) // 2
    return tuple(
        QuestionGroup(
            np.array([row[0] for row in part]),
            _pad([row[1] for row in part], PROMPT_MULTIPLE),
            _pad([row[2] for row in part], ANSWER_MULTIPLE),
        )
        for part in (rows[:half], rows[half:])
    )


def _sample_questions(settings: TrainingSettings, scene: Scene, rng: random.Random) -> list[Question]:
    tasks, weights = list(settings.task_weights), list(settings.task_weights.values())
    questions: list[Question] = []
    while len(questions) < settings.questions_per_image:
        task = rng.choices(tasks, weights)[0]
        if not scene.word and task.startswith("<OCR") and rng.random() < settings.no_word_skip:
            continue
        question = ask(scene, task, rng)
        if question:
            questions.append(question)
    return questions


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return [BOS_ID, *tokenizer.encode(text, add_special_tokens=False).ids, EOS_ID]


def _pad(rows: list[list[int]], multiple: int) -> Array:
    length = -(-max(len(row) for row in rows) // multiple) * multiple
    return np.array([row + [PAD_ID] * (length - len(row)) for row in rows], np.int64)
