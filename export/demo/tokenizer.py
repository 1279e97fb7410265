"""The demo tokenizer: byte-level BPE trained on the demo's texts, with Florence-2's added tokens in their order.

Upper-case words are removed from the training text, so each letter of a word in a scene is one token.
`python -m export.demo.tokenizer --out DIR` writes the tokenizer alone.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .questions import NUM_BINS, NUMBERS, TASK_TOKENS, ask
from .scenes import COLOURS, DIAMETERS, SHAPE_KINDS, make_scene

BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
BOS_ID, PAD_ID, EOS_ID = 0, 1, 2
NUM_MERGES = 400
MIN_FREQUENCY = 60
SEED = 7
ADDED_TOKENS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *(f"<loc_{i}>" for i in range(NUM_BINS)),
    *("<cap>", "</cap>", "<ncap>", "</ncap>", "<dcap>", "</dcap>", "<grounding>", "</grounding>", "<seg>", "</seg>"),
    *("<sep>", "<region_cap>", "</region_cap>", "<region_to_desciption>", "</region_to_desciption>"),
    *("<proposal>", "</proposal>", "<poly>", "</poly>", "<and>", "<image>"),
)


def train_tokenizer(num_scenes: int = 2000) -> Tokenizer:
    """Trains the tokenizer; deterministic.

    Args:
        num_scenes: Number of scenes whose prompts and answers are the training text.

    Returns:
        A tokenizer of 1568 ids: 4 special tokens, 256 bytes and the merges, `<mask>`, and the added tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4 + 256 + NUM_MERGES,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[BOS, PAD, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(num_scenes), trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ADDED_TOKENS])
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS, EOS_ID), (BOS, BOS_ID), trim_offsets=True, add_prefix_space=False
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes `tokenizer.json`, and `tokenizer_config.json` for transformers 4.57 and later."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "BartTokenizer",
        "bos_token": BOS,
        "cls_token": BOS,
        "eos_token": EOS,
        "sep_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "mask_token": "<mask>",
        "image_token": "<image>",
        "extra_special_tokens": {"image_token": "<image>"},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _training_text(num_scenes: int) -> Iterator[str]:
    """Yields prompts and answers without location tokens and upper-case words, and then every name many times."""
    rng = random.Random(SEED)
    for _ in range(num_scenes):
        scene = make_scene(rng, 64)
        for task in TASK_TOKENS:
            question = ask(scene, task, rng)
            if question:
                yield _without_words(question.prompt)
                yield _without_words(question.answer)
    for colour in COLOURS:
        for kind in SHAPE_KINDS:
            for size in DIAMETERS:
                names = (
                    f"{size} {colour} {kind}",
                    f"{colour} {kind}",
                    kind,
                    f"A {colour} {kind}",
                    f" {kind}s",
                    f" {size}",
                )
                counts = [f"{number.capitalize()} {kind}s and {number} {kind}s" for number in NUMBERS[2:]]
                yield from [*names, *counts] * 20


def _without_words(text: str) -> str:
    return re.sub(r"\b[A-Z]{2,}\b", " ", re.sub(r"<loc_\d+>", " ", text))


def main() -> None:
    """Command line: writes the tokenizer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, parser.parse_args().out)
    print(f"{tokenizer.get_vocab_size()} ids, <loc_0> = {tokenizer.token_to_id('<loc_0>')}")


if __name__ == "__main__":
    main()
