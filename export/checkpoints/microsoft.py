"""Microsoft's original layout (`microsoft/Florence-2-*` and their fine-tunes) in terms of transformers' native one.

Only the names of weights and the config are mapped; the Python code in such a repository is never run. Both
implementations compute the same function. `native_config` refuses settings of the original layout that the native class
does not support.
"""

from __future__ import annotations

import re
from typing import Any

from florence_onnx.errors import CheckpointError

from .weights import Layout

_BLOCK = r"^(model\.vision_tower\.blocks\.\d+\.\d+)\.(spatial|channel)_block\."
_ATTENTION = {"spatial": "window_attn", "channel": "channel_attn"}

_RENAMED = (
    (r"^model\.vision_tower\.(convs\.\d+)\.conv\.", r"vision_tower.\1.proj."),
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^model\.multi_modal_projector\.image_projection\.weight$", "image_projection"),
    (r"^model\.multi_modal_projector\.image_position_embed\.", "image_pos_embed."),
    (r"^model\.multi_modal_projector\.", ""),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)

_TOKEN_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
"""The defaults of Microsoft's text config."""

_VISION_KEPT = (
    "depths",
    "patch_size",
    "patch_stride",
    "patch_padding",
    "patch_prenorm",
    "num_heads",
    "num_groups",
    "window_size",
    "mlp_ratio",
    "qkv_bias",
)
_VISION_REQUIRED = ("dim_embed", "depths", "num_heads", "num_groups", "window_size")

_TEXT_KEPT = (
    "vocab_size",
    "max_position_embeddings",
    "encoder_layers",
    "encoder_ffn_dim",
    "encoder_attention_heads",
    "decoder_layers",
    "decoder_ffn_dim",
    "decoder_attention_heads",
    "activation_function",
    "d_model",
    "scale_embedding",
    "tie_word_embeddings",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "forced_eos_token_id",
)
_TEXT_REQUIRED = ("d_model", "encoder_layers", "decoder_layers", "vocab_size")
_TEXT_UNSUPPORTED = ("normalize_before", "add_final_layer_norm", "add_bias_logits")


def is_microsoft(config: dict[str, Any]) -> bool:
    """Whether a config.json is in the original layout."""
    vision = config.get("vision_config")
    return isinstance(vision, dict) and "dim_embed" in vision


def stored_name(native: str) -> str:
    """Returns the name in the original layout of a weight of the native class.

    Example: `model.vision_tower.blocks.0.0.spatial_block.norm1.weight` is stored as
    `vision_tower.blocks.0.0.spatial_block.window_attn.norm.weight`.
    """
    block = re.match(_BLOCK, native)
    name = native if block is None else block.group(0) + _block_name(block.group(2), native[block.end() :])
    for pattern, replacement in _RENAMED:
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    return name


def _block_name(kind: str, name: str) -> str:
    attention = _ATTENTION[kind]
    part, _, rest = name.partition(".")
    prefixes = {
        "conv1": "conv1.fn.dw.",
        "conv2": "conv2.fn.dw.",
        "norm1": f"{attention}.norm.",
        attention: f"{attention}.fn.",
        "norm2": "ffn.norm.",
        "ffn": "ffn.fn.net.",
    }
    return prefixes[part] + rest


def native_config(config: dict[str, Any]) -> dict[str, Any]:
    """Maps an original config.json to the arguments of `Florence2Config`.

    The original layout has no token `<image>`, so `image_token_id` is left to `load_checkpoint`.

    Raises:
        CheckpointError: A setting is missing, or is not supported by the native class.
    """
    vision, text = dict(config["vision_config"]), config.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError("config.json has no text_config")
    _require("vision_config", vision, _VISION_REQUIRED)
    _require("text_config", text, _TEXT_REQUIRED)
    for key in _TEXT_UNSUPPORTED:
        if text.get(key):
            raise CheckpointError(f"config.json: text_config.{key} is true, which Florence-2's BART does not support")
    kept_text = {key: text[key] for key in _TEXT_KEPT if text.get(key) is not None}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    return {
        "vision_config": _native_vision(vision, config),
        "text_config": {**kept_text, "model_type": "bart", "tie_word_embeddings": tied},
        "tie_word_embeddings": tied,
        **{key: text.get(key, default) for key, default in _TOKEN_IDS.items()},
    }


def _native_vision(vision: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    temporal = _embedding(vision, "visual_temporal_embedding", "COSINE", "max_temporal_embeddings")
    position = _embedding(vision, "image_pos_embed", "learned_abs_2d", "max_pos_embeddings")
    pooling = vision.get("image_feature_source", ["spatial_avg_pool", "temporal_avg_pool"])
    if pooling != ["spatial_avg_pool", "temporal_avg_pool"]:
        raise CheckpointError(
            f"config.json: vision_config.image_feature_source is {pooling}; "
            "only ['spatial_avg_pool', 'temporal_avg_pool'] is supported"
        )
    return {
        **{key: vision[key] for key in _VISION_KEPT if vision.get(key) is not None},
        "embed_dim": vision["dim_embed"],
        "projection_dim": vision.get("projection_dim", config.get("projection_dim")),
        "max_temporal_embeddings": temporal,
        "max_position_embeddings": position,
    }


def _embedding(vision: dict[str, Any], name: str, kind: str, size: str) -> Any:
    value = vision.get(name)
    if not isinstance(value, dict) or value.get("type") != kind or size not in value:
        raise CheckpointError(f"config.json: vision_config.{name} is {value}; expected type {kind!r} and {size}")
    return value[size]


def _require(section: str, values: dict[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise CheckpointError(f"config.json: {section} lacks {', '.join(missing)}")


LAYOUT = Layout(stored_name, frozenset({"model.multi_modal_projector.image_projection.weight"}))
"""Microsoft computes `features @ image_projection`; the native class has a `Linear`, which stores the transpose."""
