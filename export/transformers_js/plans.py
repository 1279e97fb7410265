"""The graphs of the transformers.js layout: names, example inputs and dynamic axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..graphs.plans import GraphPlan
from ..graphs.vision_encoder import VisionEncoder
from .modules import EmbedTokens, Encoder, FirstDecoder, NextDecoder

MERGED = "decoder_model_merged"
FIRST = "decoder_model"
NEXT = "decoder_with_past_model"


def plans(checkpoint: Checkpoint) -> Iterator[GraphPlan]:
    """Yields the plans of vision encoder, token embedding, text encoder, and decoder without and with a cache."""
    model = checkpoint.model
    text = model.config.text_config
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width, height = checkpoint.preprocessing.image_size
    batch = {0: "batch_size"}
    yield GraphPlan(
        "vision_encoder",
        VisionEncoder(model, checkpoint.preprocessing.image_size),
        {"pixel_values": noise(2, 3, height, width)},
        ["image_features"],
        {"pixel_values": batch, "image_features": batch},
    )
    ids = torch.randint(text.vocab_size, (2, 5), generator=generator)
    tokens = {0: "batch_size", 1: "sequence_length"}
    axes = {"input_ids": tokens, "inputs_embeds": tokens}
    yield GraphPlan("embed_tokens", EmbedTokens(model), {"input_ids": ids}, ["inputs_embeds"], axes)
    length = checkpoint.num_image_tokens + 4
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -2:] = 0
    encoded = {0: "batch_size", 1: "encoder_sequence_length"}
    yield GraphPlan(
        "encoder_model",
        Encoder(model),
        {"attention_mask": mask, "inputs_embeds": noise(2, length, text.d_model)},
        ["last_hidden_state"],
        dict.fromkeys(("attention_mask", "inputs_embeds", "last_hidden_state"), encoded),
    )
    yield _first_plan(checkpoint, mask, noise)
    yield _next_plan(checkpoint, mask, noise)


def _cache_names(prefix: str, layers: int, parts: Sequence[str] = ("decoder", "encoder")) -> list[str]:
    """Returns `prefix.0.decoder.key`, `prefix.0.decoder.value`, `prefix.0.encoder.key`, …"""
    return [f"{prefix}.{layer}.{part}.{kind}" for layer in range(layers) for part in parts for kind in ("key", "value")]


def _cache_axes(names: Sequence[str], decoder_length: str) -> dict[str, dict[int, str]]:
    lengths = {True: decoder_length, False: "encoder_sequence_length"}
    return {name: {0: "batch_size", 2: lengths[".decoder." in name]} for name in names}


def _first_plan(checkpoint: Checkpoint, mask: Tensor, noise: Callable[..., Tensor]) -> GraphPlan:
    text = checkpoint.config.text_config
    present = _cache_names("present", text.decoder_layers)
    new = {0: "batch_size", 1: "decoder_sequence_length"}
    encoded = {0: "batch_size", 1: "encoder_sequence_length"}
    return GraphPlan(
        FIRST,
        FirstDecoder(checkpoint.model),
        {
            "encoder_attention_mask": mask,
            "encoder_hidden_states": noise(*mask.shape, text.d_model),
            "inputs_embeds": noise(2, 3, text.d_model),
        },
        ["logits", *present],
        {
            **dict.fromkeys(("encoder_attention_mask", "encoder_hidden_states"), encoded),
            **dict.fromkeys(("inputs_embeds", "logits"), new),
            **_cache_axes(present, "decoder_sequence_length"),
        },
    )


def _next_plan(checkpoint: Checkpoint, mask: Tensor, noise: Callable[..., Tensor]) -> GraphPlan:
    text = checkpoint.config.text_config
    heads = text.decoder_attention_heads
    past = _cache_names("past_key_values", text.decoder_layers)
    present = _cache_names("present", text.decoder_layers, ("decoder",))
    lengths = {True: 6, False: mask.shape[1]}
    new = {0: "batch_size", 1: "decoder_sequence_length"}
    return GraphPlan(
        NEXT,
        NextDecoder(checkpoint.model),
        {
            "encoder_attention_mask": mask,
            "inputs_embeds": noise(2, 2, text.d_model),
            **{name: noise(2, heads, lengths[".decoder." in name], text.d_model // heads) for name in past},
        },
        ["logits", *present],
        {
            "encoder_attention_mask": {0: "batch_size", 1: "encoder_sequence_length"},
            **dict.fromkeys(("inputs_embeds", "logits"), new),
            **_cache_axes(past, "past_decoder_sequence_length"),
            **_cache_axes(present, "past_decoder_sequence_length + decoder_sequence_length"),
        },
    )
