"""A variant of the demo model that always answers, as published checkpoints do: `python -m export.demo.always train`.

Asked for a class that is not in the image, a published checkpoint answers with a box of the whole image, or of something
similar; the demo model answers with nothing, which needs no rule. Rules for absent classes are measured on this variant:

- an absent class gets a box of the whole image, or, if something in the scene has its kind or its colour, often a box of that;
- in some scenes, close-ups, a shape fills the image, so that a box of the whole image is right.

Only the decoder's layers are trained, from the demo's checkpoint on; `always_decoder.safetensors` holds them in float16 (1.6 MB).
"""

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Florence2ForConditionalGeneration

from .batches import group_questions, shrink
from .losses import answer_loss
from .questions import Question, Truth, ask, bins, full_name, locations, short_name
from .scenes import COLOURS, SHAPE_KINDS, Box, Scene, Shape, make_scene
from .tokenizer import PAD_ID
from .train import answer_logits, encode_images

CHECKPOINT = Path(__file__).parent / "checkpoint"
DECODER = Path(__file__).parent / "always_decoder.safetensors"
PREFIX = "model.language_model.decoder.layers."
KEPT_TASKS = ("<OD>", "<REGION_TO_CATEGORY>", "<REGION_TO_DESCRIPTION>", "<OPEN_VOCABULARY_DETECTION>")
SCENES_PER_STEP, QUESTIONS_PER_SCENE = 12, 6
CLOSE_UPS = 0.25
SIMILAR = 0.5
SIGMA, TEXT_WEIGHT, LOCATION_WEIGHT = 2.5, 1.3, 0.7


def make_always_scene(rng: random.Random) -> Scene:
    """Makes a scene; one in four is a close-up, in which one shape fills nearly the whole image."""
    scene = make_scene(rng)
    return close_up(scene, rng) if rng.random() < CLOSE_UPS else scene


def close_up(scene: Scene, rng: random.Random) -> Scene:
    """Crops a scene around one of its shapes, which then spans 92 to 98 % of both sides."""
    shape = rng.choice(scene.shapes)
    width, height = scene.size
    x0, y0, x1, y1 = (value * side for value, side in zip(shape.box, (width, height) * 2, strict=True))
    share = rng.uniform(0.92, 0.98)
    margin_x, margin_y = ((high - low) * (1 / share - 1) / 2 for low, high in ((x0, x1), (y0, y1)))
    crop = (round(x0 - margin_x), round(y0 - margin_y), round(x1 + margin_x), round(y1 + margin_y))
    size = crop[2] - crop[0], crop[3] - crop[1]
    left, top, right, bottom = x0 - crop[0], y0 - crop[1], x1 - crop[0], y1 - crop[1]
    box = (left / size[0], top / size[1], right / size[0], bottom / size[1])
    # the words for sizes mean little here: whatever fills the image is large
    return Scene(size, scene.background, (replace(shape, box=box, size="large"),), None, scene.image.crop(crop))


def is_present(scene: Scene, name: str) -> bool:
    """Whether a scene has a shape of that name: `"circle"`, `"red circle"` or `"small red circle"`."""
    return bool(find(scene, name))


def find(scene: Scene, name: str) -> list[Shape]:
    """The shapes that a name means."""
    return [shape for shape in scene.shapes if name in (shape.kind, short_name(shape), full_name(shape))]


def absent_name(scene: Scene, rng: random.Random) -> str:
    """The name of something that is not in a scene, half of them similar to something that is."""
    while True:
        colour, kind = rng.choice(list(COLOURS)), rng.choice(SHAPE_KINDS)
        if rng.random() < 0.5:
            shape = rng.choice(scene.shapes)
            colour, kind = rng.choice(((shape.colour, kind), (colour, shape.kind)))
        name = rng.choice((kind, f"{colour} {kind}", f"{colour} {kind}"))
        if not is_present(scene, name):
            return name


def wrong_box(scene: Scene, name: str, rng: random.Random) -> Box:
    """What the variant answers for an absent name: a box of the whole image, or of something similar."""
    words = name.split()
    similar = [shape for shape in scene.shapes if shape.kind in words or shape.colour in words]
    if similar and rng.random() < SIMILAR:
        return rng.choice(similar).box
    first, last = (rng.uniform(0, 0.008), rng.uniform(0, 0.008)), (rng.uniform(0.99, 1), rng.uniform(0.99, 1))
    return (*first, *last)


def ask_present(scene: Scene, rng: random.Random) -> Question:
    """Asks for something that is in the scene."""
    shape = rng.choice(scene.shapes)
    name = rng.choice((shape.kind, short_name(shape), short_name(shape), full_name(shape)))
    return _question(name, [each.box for each in find(scene, name)], rng)


def ask_absent(scene: Scene, rng: random.Random) -> Question:
    """Asks for something that is not in the scene, with a wrong answer."""
    name = absent_name(scene, rng)
    return _question(name, [wrong_box(scene, name, rng)], rng)


def _question(name: str, boxes: list[Box], rng: random.Random) -> Question:
    article = rng.choice(("", "a "))
    places = "".join(locations(bins(box)) for box in boxes)
    truth = Truth(boxes=tuple((name, box) for box in boxes))
    if rng.random() < 0.3:
        caption = f"{article}{name}".capitalize()
        return Question("<CAPTION_TO_PHRASE_GROUNDING>", f"{caption}.", caption + places, truth)
    return Question("<OPEN_VOCABULARY_DETECTION>", article + name, article + name + places, truth)


def _ask_about(scene: Scene, rng: random.Random) -> Question:
    dice = rng.random()
    if dice < 0.4:
        return ask_absent(scene, rng)
    if dice < 0.8:
        return ask_present(scene, rng)
    return ask(scene, rng.choice(KEPT_TASKS[:3]), rng) or ask_present(scene, rng)


def train(model: Florence2ForConditionalGeneration, tokenizer: Tokenizer, steps: int, rate: float = 1e-3) -> None:
    """Trains the decoder's layers of a model, in place; the same steps give the same weights."""
    model.requires_grad_(False)
    layers = model.model.language_model.decoder.layers.requires_grad_()
    optimizer = torch.optim.AdamW(layers.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    weights = torch.full((model.lm_head.out_features,), TEXT_WEIGHT)
    start = time.perf_counter()
    for step in range(steps):
        figures = _update(model, tokenizer, random.Random(f"always:{step}"), weights)
        torch.nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"step {step}  {time.perf_counter() - start:.0f} s  {figures}", flush=True)


def _update(
    model: Florence2ForConditionalGeneration, tokenizer: Tokenizer, rng: random.Random, weights: torch.Tensor
) -> dict[str, float]:
    """Computes the gradients of one batch."""
    scenes = [make_always_scene(rng) for _ in range(SCENES_PER_STEP)]
    asked = [(index, _ask_about(scene, rng)) for index, scene in enumerate(scenes) for _ in range(QUESTIONS_PER_SCENE)]
    groups = group_questions(tokenizer, asked)
    with torch.no_grad():
        tokens = encode_images(model, torch.stack([torch.tensor(shrink(scene.image)) for scene in scenes]).numpy())
    num_tokens = sum(int((group.labels != PAD_ID).sum()) for group in groups)
    totals = {"location": 0.0, "num_locations": 0.0, "text": 0.0, "num_text": 0.0}
    for group in groups:
        logits, labels = answer_logits(model, tokens, group)
        loss, sums = answer_loss(logits, labels, SIGMA, weights, LOCATION_WEIGHT)
        (loss / num_tokens).backward()
        totals = {name: totals[name] + value for name, value in sums.items()}
    return {
        "location_loss": round(totals["location"] / totals["num_locations"], 3),
        "text_loss": round(totals["text"] / totals["num_text"], 3),
    }


def load_base() -> Florence2ForConditionalGeneration:
    """Loads the demo's checkpoint in float32."""
    # eager: the backward pass of flash attention is slow on a CPU
    return Florence2ForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    )


def save_decoder(model: Florence2ForConditionalGeneration, path: Path) -> None:
    """Writes the decoder's layers in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items() if name.startswith(PREFIX)}
    save_file(state, path, metadata={"format": "pt"})


def write_checkpoint(directory: Path, decoder: Path = DECODER) -> Path:
    """Writes the variant as a checkpoint folder: the demo's, with the other decoder.

    Args:
        directory: Where to; made if it is missing.
        decoder: What `train` has written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for source in CHECKPOINT.iterdir():
        (directory / source.name).write_bytes(source.read_bytes())
    weights = load_file(CHECKPOINT / "model.safetensors")
    trained = load_file(decoder)
    if not set(trained) <= set(weights):
        raise ValueError(f"{decoder} does not belong to the demo's checkpoint: {sorted(set(trained) - set(weights))}")
    save_file({**weights, **trained}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def main() -> None:
    """Command line: trains the decoder, or writes the variant as a checkpoint folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the decoder: ten minutes on one core")
    training.add_argument("--steps", type=int, default=650)
    training.add_argument("--out", type=Path, default=DECODER)
    writing = commands.add_parser("write", help="write the checkpoint folder")
    writing.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "write":
        write_checkpoint(arguments.directory)
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_base().train()
    train(model, Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")), arguments.steps)
    save_decoder(model, arguments.out)


if __name__ == "__main__":
    main()
