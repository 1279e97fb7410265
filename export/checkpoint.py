"""Loading a Florence-2 checkpoint of either layout into transformers' native class.

Nothing of the checkpoint is executed: configs are mapped, names are mapped, pickles are read as plain tensors. Every weight is
accounted for: transformers' own `from_pretrained` warns about missing and unknown ones and goes on with random numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import Florence2Config, Florence2ForConditionalGeneration, GenerationConfig

from florence_onnx.errors import CheckpointError

from . import microsoft
from .checkpoint_files import find_folder, read_json, read_weights
from .checkpoint_settings import Preprocessing, count_image_tokens, read_generation, read_preprocessing
from .tokenizer import load_tokenizer

_SHARED = "model.language_model.shared.weight"
_EMBEDDINGS = (
    _SHARED,
    "model.language_model.encoder.embed_tokens.weight",
    "model.language_model.decoder.embed_tokens.weight",
)
_HEAD = "lm_head.weight"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CheckpointSource:
    """Where a checkpoint came from.

    Example: `CheckpointSource("microsoft/Florence-2-base", "microsoft", "float16", "5ca5edf5…", "4.57.6")`
    """

    name: str
    """Hub id, or the folder's own name: never a path of this machine."""
    layout: str
    """`transformers` or `microsoft`."""
    dtype: str
    """In which most weights are stored."""
    revision: str | None
    """The commit on the hub; None for a folder."""
    transformers_version: str
    """Of the library that the graphs are verified against."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Example: `load_checkpoint("microsoft/Florence-2-base").generation["num_beams"]` is 3.
    """

    model: Florence2ForConditionalGeneration
    """float32, on the CPU, in eval mode; `model.generation_config` is made of `generation`."""
    tokenizer: Tokenizer
    """With Florence-2's 1024 tokens and those of the fine-tune."""
    generation: dict[str, Any]
    """The checkpoint's effective defaults, see `checkpoint_settings.read_generation`."""
    preprocessing: Preprocessing
    source: CheckpointSource

    @property
    def config(self) -> Florence2Config:
        """The native config."""
        return self.model.config

    @property
    def num_image_tokens(self) -> int:
        """Rows of `image_features` per picture, 577 for 768 pixels."""
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
    model = _build_model(config, stored, is_microsoft)
    model.generation_config = GenerationConfig(**generation)
    is_local = Path(source).is_dir()
    origin = CheckpointSource(
        name=folder.resolve().name if is_local else os.fspath(source),
        layout="microsoft" if is_microsoft else "transformers",
        dtype=_common_dtype(stored),
        revision=None if is_local else folder.name,
        transformers_version=transformers.__version__,
    )
    return Checkpoint(model, tokenizer, generation, preprocessing, origin)


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


def _build_model(config: Florence2Config, stored: Weights, is_microsoft: bool) -> Florence2ForConditionalGeneration:
    try:
        # Without memory, so that nothing is drawn at random only to be thrown away.
        with torch.device("meta"):
            model = Florence2ForConditionalGeneration(config)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json describes no possible model: {type(error).__name__}: {error}") from error
    rename = microsoft.stored_name if is_microsoft else str
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = _native_weights(stored, expected, rename, is_tied=_is_tied(config))
    model.load_state_dict(weights, assign=True)
    _tie(model, is_tied=_HEAD not in stored and rename(_HEAD) not in stored or weights[_HEAD] is weights[_SHARED])
    return model.eval().requires_grad_(False)


def _is_tied(config: Florence2Config) -> bool:
    return bool(config.tie_word_embeddings and config.text_config.tie_word_embeddings)


def _tie(model: Florence2ForConditionalGeneration, *, is_tied: bool) -> None:
    """`load_state_dict(assign=True)` gives every name a parameter of its own; one embedding must be one tensor again."""
    bart = model.model.language_model
    bart.encoder.embed_tokens.weight = bart.shared.weight
    bart.decoder.embed_tokens.weight = bart.shared.weight
    if is_tied:
        model.lm_head.weight = bart.shared.weight


def _native_weights(
    stored: Weights, expected: dict[str, torch.Size], rename: Callable[[str], str], *, is_tied: bool
) -> Weights:
    """All weights of the native class in float32.

    Args:
        stored: Tensors by stored name.
        expected: Shapes by native name.
        rename: From native to stored names.
        is_tied: Whether the config ties the output layer to the embedding.
    """
    _check_logits_bias(stored)
    shared = (*_EMBEDDINGS, _HEAD)
    names = {native: rename(native) for native in expected}
    required = {names[native]: native for native in expected if native not in shared}
    known = {*names.values(), microsoft.LOGITS_BIAS}
    _refuse("lacks weights", sorted(required.keys() - stored.keys()))
    _refuse("has unknown weights", sorted(stored.keys() - known))
    _refuse("has weights of the wrong shape or type", _misfits(stored, expected, names))
    weights = {native: _to_native(stored[name], native) for name, native in required.items()}
    weights.update(_embeddings(stored, names, is_tied=is_tied))
    return weights


def _refuse(fault: str, names: Sequence[str]) -> None:
    if names:
        rest = "" if len(names) <= 10 else f" … ({len(names)} in all)"
        raise CheckpointError(f"the checkpoint {fault} ({len(names)}): {', '.join(names[:10])}{rest}")


def _misfits(stored: Weights, expected: dict[str, torch.Size], names: dict[str, str]) -> list[str]:
    misfits = []
    for native, shape in expected.items():
        tensor = stored.get(names[native])
        wanted = shape[::-1] if names[native] != native and native in microsoft.TRANSPOSED else shape
        if tensor is not None and tensor.shape != wanted:
            misfits.append(f"{names[native]} {list(tensor.shape)}, not {list(wanted)}")
        elif tensor is not None and not tensor.is_floating_point():
            misfits.append(f"{names[native]} {str(tensor.dtype).removeprefix('torch.')}, not a float type")
    return misfits


def _to_native(tensor: torch.Tensor, native: str, *, is_renamed: bool = False) -> torch.Tensor:
    value = tensor.T if is_renamed and native in microsoft.TRANSPOSED else tensor
    return value.to(torch.float32).contiguous()


def _check_logits_bias(stored: Weights) -> None:
    bias = stored.get(microsoft.LOGITS_BIAS)
    if bias is not None and bool(bias.count_nonzero()):
        raise CheckpointError(
            f"{microsoft.LOGITS_BIAS} is not zero (up to {float(bias.abs().max()):.3g}); transformers' Florence-2 adds no bias "
            "to the logits, so this checkpoint cannot be reproduced"
        )


def _embeddings(stored: Weights, names: dict[str, str], *, is_tied: bool) -> Weights:
    """The one embedding under its three names, and the output layer, whichever of the four the file holds."""
    inputs = [names[native] for native in _EMBEDDINGS if names[native] in stored]
    head = names[_HEAD]
    if not inputs and head not in stored:
        raise CheckpointError(f"the checkpoint lacks weights (1): {names[_SHARED]}")
    if not is_tied and (head not in stored or not inputs):
        lacking = head if head not in stored else names[_SHARED]
        raise CheckpointError(f"the checkpoint lacks weights (1): {lacking} (config.json: tie_word_embeddings is false)")
    first = inputs[0] if inputs else head
    different = [name for name in inputs if not torch.equal(stored[name], stored[first])]
    if different:
        raise CheckpointError(f"{first} and {', '.join(different)} differ; Florence-2 has one embedding for both sides")
    embedding = _to_native(stored[first], _SHARED)
    if is_tied and head in stored and not torch.equal(stored[head], stored[first]):
        raise CheckpointError(
            f"{head} differs from {first}, but config.json ties them; if the output layer is meant to be separate, set "
            '"tie_word_embeddings": false in config.json and its text_config'
        )
    output = embedding if is_tied else _to_native(stored[head], _HEAD)
    return {**dict.fromkeys(_EMBEDDINGS, embedding), _HEAD: output}


def _common_dtype(stored: Weights) -> str:
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + tensor.numel()
    return max(sizes, key=lambda name: sizes[name])
