"""Random-weight Florence-2 checkpoints in transformers' native layout, small enough for every test.

transformers' own initialisation makes a model that says the same whatever it sees. The weights drawn here are large enough that
the image and the prompt change the answer, which is what a parity test needs.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

GENERATION: dict[str, Any] = {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "num_beams": 3,
    "no_repeat_ngram_size": 3,
    "early_stopping": True,
}
"""What Florence-2's own checkpoints generate with."""

TEXTS = (
    "What does the image describe?",
    "Describe in detail what is shown in the image.",
    "Describe with a paragraph what is shown in the image.",
    "What is the text in the image, with regions?",
    "Locate the objects with category name in the image.",
    "Locate the objects in the image, with their descriptions.",
    "Locate the region proposals in the image.",
    "Locate the phrases in the caption: a red car",
    "What is the polygon mask of region",
    "What text is in the region describe?",
)
"""What the small vocabulary is learned from."""


@functools.cache
def added_tokens() -> tuple[str, ...]:
    """Florence-2's 1024 tokens in the order in which Microsoft's processor adds them."""
    tags = "<cap> </cap> <ncap> </ncap> <dcap> </dcap> <grounding> </grounding> <seg> </seg> <sep> <region_cap> </region_cap>"
    more = "<region_to_desciption> </region_to_desciption> <proposal> </proposal> <poly> </poly> <and>"
    locations = [f"<loc_{index}>" for index in range(1000)]
    return ("<od>", "</od>", "<ocr>", "</ocr>", *locations, *tags.split(), *more.split())


def plain_tokenizer() -> Tokenizer:
    """A byte-level BPE like BART's, without Florence-2's tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return tokenizer


def build_tokenizer() -> Tokenizer:
    """`plain_tokenizer` with the 1024 added tokens and `<image>`."""
    tokenizer = plain_tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*added_tokens(), "<image>")])
    return tokenizer


@functools.cache
def num_tokens() -> int:
    """Entries of `build_tokenizer`."""
    size: int = build_tokenizer().get_vocab_size()
    return size


def tiny_config() -> Florence2Config:
    """The smallest regular model: 128 x 128 pixels, 17 image tokens, 2 + 2 layers, about 0.4 M parameters."""
    vision = {
        "embed_dim": [16, 32, 64, 64],
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 4],
        "num_groups": [1, 2, 4, 4],
        "window_size": 4,
        "projection_dim": 64,
        "drop_path_rate": 0.0,
    }
    text = {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_position_embeddings": 1024,
    }
    return _config(vision, text, num_tokens())


def odd_config() -> Florence2Config:
    """Every size unusual: 96 x 96 pixels that no window divides, unequal layers, heads and widths, an odd vocabulary."""
    vision = {
        "embed_dim": [24, 40, 72, 90],
        "depths": [1, 2, 1, 1],
        "num_heads": [2, 4, 6, 5],
        "num_groups": [3, 5, 4, 9],
        "window_size": 5,
        "projection_dim": 144,
        "max_position_embeddings": 11,
        "max_temporal_embeddings": 7,
        "drop_path_rate": 0.1,
    }
    text = {
        "d_model": 144,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 6,
        "decoder_attention_heads": 8,
        "encoder_ffn_dim": 200,
        "decoder_ffn_dim": 168,
        "max_position_embeddings": 512,
    }
    return _config(vision, text, num_tokens() + 8 - num_tokens() % 2 + 1)


FULL_SIZES: dict[str, dict[str, Any]] = {
    "base": {
        "vision": {"embed_dim": [128, 256, 512, 1024], "num_heads": [4, 8, 16, 32], "num_groups": [4, 8, 16, 32]},
        "text": {"d_model": 768, "heads": 12, "layers": 6, "positions": 1024},
    },
    "large": {
        "vision": {"embed_dim": [256, 512, 1024, 2048], "num_heads": [8, 16, 32, 64], "num_groups": [8, 16, 32, 64]},
        "text": {"d_model": 1024, "heads": 16, "layers": 12, "positions": 4096},
    },
}
"""From the published configs; `depths` (1, 1, 9, 1) and the rest are Florence2Config's defaults."""

FULL_VOCABULARY = 51328
"""51290 tokens, padded to a multiple of 64, as transformers' conversion writes it."""


def full_size_config(size: str) -> Florence2Config:
    """Florence-2-base or -large: 768 x 768 pixels, 577 image tokens.

    Args:
        size: A key of `FULL_SIZES`.
    """
    text = FULL_SIZES[size]["text"]
    width, layers = text["d_model"], text["layers"]
    return _config(
        {
            **FULL_SIZES[size]["vision"],
            "depths": [1, 1, 9, 1],
            "window_size": 12,
            "projection_dim": width,
            "drop_path_rate": 0.0,
        },
        {
            "d_model": width,
            "max_position_embeddings": text["positions"],
            **{f"{side}_layers": layers for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": text["heads"] for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 4 * width for side in ("encoder", "decoder")},
        },
        FULL_VOCABULARY,
    )


def image_size(config: Florence2Config) -> int:
    """The square input size that belongs to a config of this module, in pixels."""
    return {4: 128, 5: 96, 12: 768}[config.vision_config.window_size]


def num_image_tokens(config: Florence2Config) -> int:
    """Image tokens at `image_size`: the grid of the last stage and one for its mean."""
    return (image_size(config) // 32) ** 2 + 1


def build_model(config: Florence2Config, seed: int = 0) -> Florence2ForConditionalGeneration:
    """A model with weights drawn from `seed`, float32, in eval mode, that generates as Florence-2 does."""
    model = Florence2ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    is_full_size = config.text_config.d_model >= 512
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(_draw(name, parameter.shape, generator, is_full_size=is_full_size))
    model.generation_config = GenerationConfig(**GENERATION)
    return model


def build_checkpoint(path: Path, config: Florence2Config | None = None, seed: int = 0) -> Path:
    """Write a complete native checkpoint folder.

    Args:
        path: Folder to create: model.safetensors, config, generation config, preprocessor, processor and tokenizer files.
        config: `tiny_config()` by default.
        seed: Of the weights.

    Returns:
        `path`.
    """
    config = config or tiny_config()
    build_model(config, seed).save_pretrained(path)
    build_processor(config).save_pretrained(path)
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        content = json.loads((path / name).read_text())
        content["processor_class"] = "Florence2Processor"
        (path / name).write_text(json.dumps(content, indent=2))
    return path


def build_full_size_checkpoint(path: Path, size: str, tokenizer: Path | None = None) -> Path:
    """Write a checkpoint of the size of Florence-2-base or -large with random weights.

    Args:
        path: Folder to create.
        size: A key of `FULL_SIZES`.
        tokenizer: Folder with the `tokenizer.json` and `tokenizer_config.json` of Florence-2; without it the small
            tokenizer of this module, whose tokens are the first of the vocabulary.

    Returns:
        `path`.
    """
    config = full_size_config(size)
    if tokenizer is None:
        return build_checkpoint(path, config)
    config.image_token_id = 51289
    build_model(config).save_pretrained(path)
    build_processor(config).image_processor.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tokenizer / name).read_bytes())
    return path


def build_processor(config: Florence2Config) -> Florence2Processor:
    """transformers' processor with the small tokenizer and the config's image size."""
    side = {"height": image_size(config), "width": image_size(config)}
    image_processor = CLIPImageProcessor(
        size=side,
        crop_size=side,
        do_center_crop=False,
        do_convert_rgb=None,
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    image_processor.image_seq_length = num_image_tokens(config)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": "<image>"},
    )
    return _AnyTokenizerProcessor(image_processor=image_processor, tokenizer=tokenizer)


class _AnyTokenizerProcessor(Florence2Processor):  # type: ignore[misc]
    """transformers insists on BART's own tokenizer classes, which rewrite a custom vocabulary."""

    tokenizer_class = "PreTrainedTokenizerFast"


def _config(vision: dict[str, Any], text: dict[str, Any], vocab_size: int) -> Florence2Config:
    dropouts = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return Florence2Config(
        vision_config=vision,
        text_config={"model_type": "bart", "vocab_size": vocab_size, **text, **dropouts},
        image_token_id=build_tokenizer().token_to_id("<image>"),
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )


def _draw(name: str, shape: torch.Size, generator: torch.Generator, *, is_full_size: bool) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if "norm" in name:
        return 1 + 0.2 * noise
    if "shared" in name:
        return 0.2 * noise
    if "embed" in name:
        return 0.5 * noise
    fan_in = shape[1:].numel()
    if ".conv1." in name or ".conv2." in name:
        return 0.3 / fan_in**0.5 * noise  # x + conv(x), 48 times in the full-size model: more overflows fp16
    # In wide, deep models large gains multiply the rounding of every layer until fp32 itself is not reproducible.
    gain = 0.5 if is_full_size else 1.6 if "language_model" in name else 1.4
    return gain / fan_in**0.5 * noise
