"""Writes a native checkpoint in Microsoft's original layout: the inverse of what the exporter reads, written independently.

The names are those of Microsoft's `modeling_florence2.py`, spelled out per weight.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK_NAMES = {
    "conv1": "conv1.fn.dw",
    "norm1": "{attention}.norm",
    "{attention}.qkv": "{attention}.fn.qkv",
    "{attention}.proj": "{attention}.fn.proj",
    "conv2": "conv2.fn.dw",
    "norm2": "ffn.norm",
    "ffn.fc1": "ffn.fn.net.fc1",
    "ffn.fc2": "ffn.fn.net.fc2",
}
"""Native to original, within a block."""

PROJECTOR_NAMES = {
    "image_proj_norm.weight": "image_proj_norm.weight",
    "image_proj_norm.bias": "image_proj_norm.bias",
    "image_position_embed.row_embeddings.weight": "image_pos_embed.row_embeddings.weight",
    "image_position_embed.column_embeddings.weight": "image_pos_embed.column_embeddings.weight",
    "visual_temporal_embed.pos_idx_to_embed": "visual_temporal_embed.pos_idx_to_embed",
}


def original_names(depths: list[int]) -> dict[str, str]:
    """Original to native names of everything but the language model and the image projection."""
    names: dict[str, str] = {}
    for stage, depth in enumerate(depths):
        for part, original in (("conv", "proj"), ("norm", "norm")):
            for kind in ("weight", "bias"):
                names[f"vision_tower.convs.{stage}.{original}.{kind}"] = (
                    f"model.vision_tower.convs.{stage}.{part}.{kind}"
                )
        for index in range(depth):
            for block, attention in (("spatial_block", "window_attn"), ("channel_block", "channel_attn")):
                prefix = f"vision_tower.blocks.{stage}.{index}.{block}"
                for native, original in BLOCK_NAMES.items():
                    left, right = original.format(attention=attention), native.format(attention=attention)
                    for kind in ("weight", "bias"):
                        names[f"{prefix}.{left}.{kind}"] = f"model.{prefix}.{right}.{kind}"
    for native, original in PROJECTOR_NAMES.items():
        names[original] = f"model.multi_modal_projector.{native}"
    return names


def original_weights(native: dict[str, torch.Tensor], depths: list[int]) -> dict[str, torch.Tensor]:
    """Microsoft's state dict, with the tied embedding under all four names, as the published files have it."""
    weights = {original: native[name] for original, name in original_names(depths).items()}
    weights["image_projection"] = native["model.multi_modal_projector.image_projection.weight"].T
    for name, tensor in native.items():
        if name.startswith("model.language_model."):
            weights[name.replace("model.language_model.", "language_model.model.", 1)] = tensor
    embedding = native["model.language_model.shared.weight"]
    for tied in ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"):
        weights[f"language_model.{tied}"] = embedding
    weights["language_model.final_logits_bias"] = torch.zeros(1, len(embedding))
    return {name: tensor.clone().contiguous() for name, tensor in weights.items()}


def original_config(config: dict[str, Any]) -> dict[str, Any]:
    """Microsoft's config.json for a native one."""
    vision, text = dict(config["vision_config"]), dict(config["text_config"])
    kept = ("depths", "patch_size", "patch_stride", "patch_padding", "patch_prenorm", "num_heads", "num_groups")
    sizes = ("vocab_size", "d_model", "max_position_embeddings")
    sides = [f"{side}_{part}" for side in ("encoder", "decoder") for part in ("layers", "ffn_dim", "attention_heads")]
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_florence2.Florence2Config"},
        "model_type": "florence2",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "projection_dim": vision["projection_dim"],
        "vocab_size": text["vocab_size"],
        "is_encoder_decoder": True,
        "torch_dtype": "float16",
        "text_config": {
            **{key: text[key] for key in (*sizes, *sides)},
            "activation_function": "gelu",
            "add_bias_logits": False,
            "add_final_layer_norm": False,
            "normalize_before": False,
            "scale_embedding": False,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_bos_token_id": 0,
            "forced_eos_token_id": 2,
            "early_stopping": True,
            "no_repeat_ngram_size": 3,
            "num_beams": 3,
        },
        "vision_config": {
            "model_type": "davit",
            "dim_embed": vision["embed_dim"],
            **{key: vision[key] for key in kept},
            "window_size": vision["window_size"],
            "drop_path_rate": 0.1,
            "enable_checkpoint": False,
            "projection_dim": vision["projection_dim"],
            "visual_temporal_embedding": {
                "type": "COSINE",
                "max_temporal_embeddings": vision["max_temporal_embeddings"],
            },
            "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": vision["max_position_embeddings"]},
            "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        },
    }


def write_microsoft(native: Path, target: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the folder `native` once more in the original layout.

    Args:
        native: A native checkpoint folder.
        target: Folder to create, with the tokenizer as it is in `native`.
        dtype: Of the stored weights.

    Returns:
        `target`.
    """
    target.mkdir(parents=True)
    config = json.loads((native / "config.json").read_text())
    weights = original_weights(load_file(native / "model.safetensors"), config["vision_config"]["depths"])
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(original_config(config)))
    # What Microsoft's repositories say, and what Microsoft's generate does not read.
    (target / "generation_config.json").write_text(json.dumps({"num_beams": 3, "early_stopping": False}))
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(native / name, target / name)
    return target
