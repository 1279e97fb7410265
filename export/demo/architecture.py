"""The tiny Florence-2: its config, and an initialisation that makes neighbouring positions similar.

3.26 M parameters, input of 128 x 128 pixels, 65 image tokens.
"""

import math

import torch
from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration, Florence2VisionConfig

from .questions import NUM_BINS

IMAGE_SIZE = 128  # pixels, both sides
GRID = 8  # image tokens per side; one pooled token comes before them
WIDTH = 128  # features per token
FIRST_LOCATION_ID = 547  # of <loc_0>
VOCABULARY = 1568
IMAGE_TOKEN_ID = 1567
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def make_config() -> Florence2Config:
    """Returns the config of the demo model."""
    vision = Florence2VisionConfig(
        depths=(1, 1, 2, 1),
        patch_size=(7, 3, 3, 3),
        patch_stride=(4, 2, 2, 1),
        patch_padding=(3, 1, 1, 1),
        patch_prenorm=(False, True, True, True),
        embed_dim=(32, 64, 128, 128),
        num_heads=(1, 2, 4, 4),
        num_groups=(1, 2, 4, 4),
        window_size=8,
        drop_path_rate=0.0,
        mlp_ratio=4.0,
        projection_dim=WIDTH,
        max_temporal_embeddings=100,
        max_position_embeddings=50,
    )
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    text = BartConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        max_position_embeddings=1024,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        activation_function="gelu",
        scale_embedding=False,
        **special,
    )
    return Florence2Config(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN_ID, **special)


def build_model(seed: int = 0) -> Florence2ForConditionalGeneration:
    """Builds a new model. Attention is eager: the backward pass of sdpa takes about twice as long on a CPU."""
    torch.manual_seed(seed)
    model: Florence2ForConditionalGeneration = Florence2ForConditionalGeneration._from_config(
        make_config(), attn_implementation="eager"
    )
    model.tie_weights()
    initialise_smoothly(model, seed)
    return model


@torch.no_grad()
def initialise_smoothly(model: Florence2ForConditionalGeneration, seed: int) -> None:
    """Initialises location tokens and position tables with Fourier codes, so that neighbours start similar."""
    generator = torch.Generator().manual_seed(seed)
    language_model = model.model.language_model
    _initialise_tokens(language_model.shared.weight, generator)
    for table in (language_model.encoder.embed_positions, language_model.decoder.embed_positions):
        table.weight.copy_(_token_positions(table.weight.shape[0], generator))
    grid = model.model.multi_modal_projector.image_position_embed
    for table in (grid.row_embeddings, grid.column_embeddings):
        table.weight.copy_(_grid_positions(*table.weight.shape))


def _initialise_tokens(embeddings: torch.Tensor, generator: torch.Generator) -> None:
    embeddings.normal_(0, 0.08, generator=generator)
    embeddings[1].zero_()
    x = torch.arange(NUM_BINS)[:, None] / NUM_BINS
    code = _waves(x, torch.linspace(0.25, 24.0, WIDTH // 2))  # similar within about 1/48 of the image
    shift = 0.08 * torch.randn(WIDTH, generator=generator)
    rotated = 0.11 * code @ _rotation(generator) + shift
    embeddings[FIRST_LOCATION_ID : FIRST_LOCATION_ID + NUM_BINS] = rotated


def _token_positions(num_positions: int, generator: torch.Generator) -> torch.Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(WIDTH // 2) / (WIDTH // 2)) / (2 * math.pi)
    return 0.05 * _waves(torch.arange(num_positions)[:, None], frequencies) @ _rotation(generator)


def _grid_positions(num_positions: int, width: int) -> torch.Tensor:
    x = (torch.arange(num_positions)[:, None] + 0.5) / GRID
    return 0.7 * _waves(x, torch.linspace(0.25, 3.0, width // 2))


def _waves(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Returns sines and cosines (N, 2F) of positions (N, 1) at F frequencies, in cycles per unit."""
    phase = 2 * math.pi * x * frequencies[None]
    return torch.cat([phase.sin(), phase.cos()], 1)


def _rotation(generator: torch.Generator) -> torch.Tensor:
    rotation: torch.Tensor = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    return rotation
