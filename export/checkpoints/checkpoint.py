"""Loading a Florence-2 checkpoint of either layout into transformers' native class.

No code of the checkpoint is run: its config and the names of its weights are mapped, and pickles are read as plain
tensors. A missing or unknown weight is an error. transformers' own `from_pretrained` only warns, and initialises a
missing one at random.
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
    """float32, on the CPU, in eval mode; its `generation_config` is built from `generation`. When it is called with
    `pixel_values`, `input_ids` must hold `config.image_token_id` once per image token, as transformers' processor
    writes them."""
    tokenizer: Tokenizer
    """Includes Florence-2's 1024 added tokens and the extra tokens of a fine-tune."""
    generation: dict[str, Any]
    """The checkpoint's effective generation defaults, see `generation.read_generation`."""
    preprocessing: Preprocessing
    source: dict[str, Any]
    """Where the checkpoint comes from, as it is written into a bundle: `name` (the hub id, or the folder's name without
    its path), `layout` (`transformers` or `microsoft`), `dtype` (of most stored weights), `revision` (the commit on the
    hub; None for a folder) and `transformers_version` (of the library that the graphs are verified against)."""

    @property
    def config(self) -> Florence2Config:
        """The config in transformers' native layout."""
        return self.model.config

    @property
    def num_image_tokens(self) -> int:
        """Rows of `image_features` per image: 577 at 768 x 768 pixels."""
        return count_image_tokens(self.config, self.preprocessing.image_size)


def load_checkpoint(source: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Loads a Florence-2 checkpoint in transformers' native or in Microsoft's original layout.

    Args:
        source: A folder or a hub id. safetensors are preferred to a pickled state dict; both may be sharded.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The model in float32 with everything that an export needs.

    Raises:
        CheckpointError: The checkpoint cannot be found or downloaded, is not a Florence-2, or its weights, config and
            tokenizer do not fit each other. A non-zero `final_logits_bias` is refused, because the native class has no
            such bias (it is zero in all published checkpoints).
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
    # Microsoft's embedding has no row for `<image>`. Image features overwrite the placeholder's embeddings, so any
    # token will do that does not occur in text: byte-level BPE has no use for <unk>.
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
        # On the meta device nothing is allocated or initialised: all weights are assigned below.
        with torch.device("meta"):
            model = Florence2ForConditionalGeneration(config)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, ZeroDivisionError) as error:
        raise CheckpointError(f"no model can be built from config.json: {type(error).__name__}: {error}") from error
    is_tied = bool(config.tie_word_embeddings and config.text_config.tie_word_embeddings)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(native_weights(stored, shapes, layout, is_tied=is_tied), assign=True)
    _tie(model, is_tied=is_tied)
    model.train(False).requires_grad_(False)
    return model


def _tie(model: Florence2ForConditionalGeneration, *, is_tied: bool) -> None:
    """Makes the token embedding one parameter under all its names: `load_state_dict(assign=True)` made one of each."""
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
