"""The sizes that a bundle states, from a checkpoint's config."""

from __future__ import annotations

from transformers import Florence2Config

from florence_onnx.bundles.bundle import ModelSizes

from .preprocessing import Preprocessing, count_image_tokens


def model_sizes(config: Florence2Config, preprocessing: Preprocessing) -> ModelSizes:
    """What the runtime must know about a model.

    Raises:
        CheckpointError: The images do not fit the model's position embedding.
    """
    text = config.text_config
    return ModelSizes(
        image_size=preprocessing.image_size,
        image_mean=preprocessing.image_mean,
        image_std=preprocessing.image_std,
        decoder_layers=text.decoder_layers,
        decoder_heads=text.decoder_attention_heads,
        head_dim=text.d_model // text.decoder_attention_heads,
        max_positions=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        num_image_tokens=count_image_tokens(config, preprocessing.image_size),
        pad_token_id=text.pad_token_id,
    )
