"""Loading a Florence-2 checkpoint of either layout into transformers' native class.

Nothing of the checkpoint is executed: configs are mapped, names are mapped, pickles are read as plain tensors. Every weight is
accounted for: transformers' own `from_pretrained` warns about missing and unknown ones and goes on with random numbers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import Florence2Config, Florence2ForConditionalGeneration, GenerationConfig

from florence_onnx.errors import CheckpointError

from . import microsoft
from .folder import find_folder
from .generation import read_generation
from .json_files import read_json
from .preprocessing import Preprocessing, count_image_tokens, read_preprocessing
from .tokenizer import load_tokenizer
from .weight_files import read_weights
from .weights import NATIVE, Layout, Weights, native_weights


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Example: `load_checkpoint("microsoft/Florence-2-base").generation["num_beams"]` is 3.
    """

    model: Florence2ForConditionalGeneration
    """float32, on the CPU, in eval mode; `model.generation_config` is made of `generation`. With `pixel_values`, `input_ids` must hold
    `config.image_token_id` once per image token, as transformers' processor writes them."""
    tokenizer: Tokenizer
    """With Florence-2's 1024 tokens and those of the fine-tune."""
    generation: dict[str, Any]
    """The checkpoint's effective defaults, see `checkpoint_settings.read_generation`."""
    preprocessing: Preprocessing
    source: dict[str, Any]
    """`name` (hub id, or the folder's own name: never a path of this machine), `layout` (`transformers` or `microsoft`), `dtype`
    in which most weights are stored, `revision` (commit on the hub; None for a folder), `transformers_version` (the library that
    the graphs are verified against)."""

    @property
    def config(self) -> Florence2Config:
        """The native config."""
        return self.model.config

    @property
    def num_image_tokens(self) -> int:
        """Rows of `image_features` per image, 577 for 768 pixels."""
        return count_image_tokens(self.config, self.preprocessing.image_size)


def load_checkpoint(source: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Load a Florence-2 checkpoint of transformers' native or of Microsoft's original layout.

    Args:
        source: A folder, or a hub id. safetensors are preferred to a pickled state dict; both may be sharded.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The model in float32 with everything that an export needs.

    Raises:
        CheckpointError: It cannot be had, is not Florence-2, or its weights, config and tokenizer do not fit each other. A
            non-zero `final_logits_bias` is refused: the native class has no place for it (all published ones are zero).
    """
    folder = find_folder(source, revision)
    config_json = _read_config(folder)
    is_microsoft = microsoft.is_microsoft(config_json)
    config = _build_config(config_json, is_microsoft)
    preprocessing = read_preprocessing(folder)
    count_image_tokens(config, preprocessing.image_size)
    generation = read_generation(folder, config_json, is_microsoft=is_microsoft)
    tokenizer = load_tokenizer(folder, config.text_config.vocab_size, generation)
    stored = read_weights(folder)
    model = _build_model(config, stored, microsoft.LAYOUT if is_microsoft else NATIVE)
    # The originals' tables have no row for `<image>`. The row of the placeholder is never used, only its place; byte-level BPE never
    # gives <unk>.
    model.config.image_token_id = tokenizer.token_to_id("<unk>") if is_microsoft else config.image_token_id
    model.generation_config = GenerationConfig(**generation)
    origin = {
        **_origin(source, folder),
        "layout": "microsoft" if is_microsoft else "transformers",
        "dtype": _common_dtype(stored),
        "transformers_version": transformers.__version__,
    }
    return Checkpoint(model, tokenizer, generation, preprocessing, origin)


def _origin(source: str | os.PathLike[str], folder: Path) -> dict[str, str | None]:
    if Path(source).is_dir():
        return {"name": folder.resolve().name, "revision": None}
    # huggingface_hub names a snapshot's folder after its commit.
    return {"name": os.fspath(source), "revision": folder.name}


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder, "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json; give the folder of a Florence-2 checkpoint")
    if config.get("model_type") != "florence2":
        raise CheckpointError(f"{folder} is not a Florence-2 checkpoint: model_type is {config.get('model_type')!r}")
    for section in ("vision_config", "text_config"):
        if not isinstance(config.get(section), dict):
            raise CheckpointError(f"{folder}/config.json has no {section}; it is not a complete Florence-2 config")
    return config


def _build_config(config: dict[str, Any], is_microsoft: bool) -> Florence2Config:
    values = microsoft.native_config(config) if is_microsoft else config
    kind = values["text_config"].get("model_type", "bart")
    if kind != "bart":
        raise CheckpointError(f"config.json: text_config.model_type is {kind!r}; Florence-2's is 'bart'")
    try:
        built = Florence2Config.from_dict(values)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"config.json cannot be used: {type(error).__name__}: {error}") from error
    if built.vision_config.projection_dim != built.text_config.d_model:
        raise CheckpointError(
            f"config.json: projection_dim {built.vision_config.projection_dim} differs from d_model "
            f"{built.text_config.d_model}"
        )
    return built


def _build_model(config: Florence2Config, stored: Weights, layout: Layout) -> Florence2ForConditionalGeneration:
    try:
        # Without memory, so that nothing is drawn at random only to be thrown away.
        with torch.device("meta"):
            model = Florence2ForConditionalGeneration(config)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json describes no possible model: {type(error).__name__}: {error}") from error
    is_tied = bool(config.tie_word_embeddings and config.text_config.tie_word_embeddings)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(native_weights(stored, shapes, layout, is_tied=is_tied), assign=True)
    _tie(model, is_tied=is_tied)
    model.train(False).requires_grad_(False)
    return model


def _tie(model: Florence2ForConditionalGeneration, *, is_tied: bool) -> None:
    """`load_state_dict(assign=True)` gives every name a parameter of its own; one embedding must be one tensor again."""
    bart = model.model.language_model
    bart.encoder.embed_tokens.weight = bart.shared.weight
    bart.decoder.embed_tokens.weight = bart.shared.weight
    if is_tied:
        model.lm_head.weight = bart.shared.weight


def _common_dtype(stored: Weights) -> str:
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + tensor.numel()
    return max(sizes, key=lambda name: sizes[name])
