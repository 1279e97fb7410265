"""Loading a Florence-2 checkpoint of either layout into transformers' native class.

No code of the checkpoint is run: its config and the names of its weights are mapped, and pickles are read as plain
tensors. A missing or unknown weight is an error. transformers' own `from_pretrained` only warns, and initialises a
missing one at random.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import Florence2Config, Florence2ForConditionalGeneration

from florence_onnx.errors import CheckpointError

from . import microsoft
from .adapters import ADAPTER_CONFIG, Adapter, attach_adapter, find_adapter, is_unmerged, read_adapter, split_unmerged
from .folder import find_folder
from .generation import GenerationSettings, read_settings
from .json_files import read_json
from .model_card import read_facts
from .original import load_original, share_weights
from .preprocessing import Preprocessing, check_image_size, count_image_tokens, has_preprocessing, read_preprocessing
from .quantized import check_not_quantized
from .sizes import model_sizes
from .tokenizer import SPECIAL_TOKENS, has_tokenizer, load_tokenizer
from .weight_files import read_weights
from .weights import NATIVE, Layout, Weights, native_weights, strip_prefixes

Source = str | os.PathLike[str]
"""A folder or a hub id."""

_log = logging.getLogger("florence_onnx")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Example: `load_checkpoint("microsoft/Florence-2-base").generation["num_beams"]` is 3.
    """

    model: Florence2ForConditionalGeneration
    """float32, on the CPU, in eval mode, adapters merged. When it is called with `pixel_values`, `input_ids` must hold
    `config.image_token_id` once per image token, as transformers' processor writes them."""
    tokenizer: Tokenizer
    """Includes Florence-2's 1024 added tokens and the extra tokens of a fine-tune."""
    generation: dict[str, Any]
    """The checkpoint's effective generation defaults, see `generation.GenerationSettings.values`."""
    preprocessing: Preprocessing
    source: dict[str, Any]
    """Where the checkpoint comes from, as it is written into a bundle: `name` (the hub id, or the folder's name without
    its path), `layout` (`transformers` or `microsoft`), `dtype` (of most stored weights), `revision` (the commit on the
    hub; None for a folder), `license` and `base_model` (of its model card; of a hub id the base model is itself),
    `adapter` (the name of an adapter that was merged, or None) and `transformers_version` (of the library that the
    graphs are verified against)."""
    notes: tuple[str, ...] = ()
    """What is unusual about the checkpoint, each a sentence for the user."""
    load_reference: Callable[[], Florence2ForConditionalGeneration | None] = field(default=lambda: None, repr=False)
    """Loads the model as its own library does; None where no library does, and `model` is the reference."""
    other_image_sizes: tuple[tuple[int, int], ...] = ()
    """Sizes `(width, height)` in pixels for which an export has a vision encoder each, beside `preprocessing.image_size`."""

    @property
    def config(self) -> Florence2Config:
        """The config in transformers' native layout."""
        return self.model.config

    @property
    def num_image_tokens(self) -> int:
        """Rows of `image_features` per image: 577 at 768 x 768 pixels."""
        return count_image_tokens(self.config, self.preprocessing.image_size)

    def resized(self, image_sizes: Sequence[tuple[int, int]]) -> Checkpoint:
        """The same checkpoint, for images of other sizes; the model and the reference are shared.

        Args:
            image_sizes: `(width, height)` in pixels; the first is the default of an export, repetitions are ignored.

        Raises:
            CheckpointError: A size does not fit the checkpoint's position embeddings.
        """
        first, *others = dict.fromkeys(image_sizes)
        for size in (first, *others):
            check_image_size(self.config, size)
        inputs = replace(self.preprocessing, image_size=first)
        return replace(
            self, preprocessing=inputs, other_image_sizes=tuple(others), load_reference=lambda: self.reference
        )

    @functools.cached_property
    def reference(self) -> Florence2ForConditionalGeneration:
        """What an export is verified against, with all generation settings of the checkpoint, also those that are not
        exported.

        A folder in the native layout is loaded by transformers' `from_pretrained`, an adapter is applied by PEFT
        without merging it. Microsoft's layout, whose own class is remote code that is never run, and weights under a
        prefix that `from_pretrained` would not find, are `model` itself.
        """
        # Parameters that are made in inference mode could never be used outside of it.
        with torch.inference_mode(mode=False):
            return self.load_reference() or self.model


def load_checkpoint(
    source: Source,
    *,
    revision: str | None = None,
    processor: Source | None = None,
    adapter: Source | None = None,
    base: Source | None = None,
) -> Checkpoint:
    """Loads a Florence-2 checkpoint in transformers' native or in Microsoft's original layout, or an adapter of PEFT
    with its base.

    Args:
        source: A folder or a hub id. safetensors are preferred to a pickled state dict; both may be sharded. An adapter
            as PEFT writes it (adapter_config.json and adapter_model.safetensors) is merged into its base model.
        revision: Branch, tag or commit of a hub id.
        processor: Folder or hub id of the tokenizer and the preprocessing, for checkpoints without them.
        adapter: Folder or hub id of an adapter to merge into `source`.
        base: Folder or hub id of the base model, where `source` is an adapter; by default what adapter_config.json
            names.

    Returns:
        The model in float32 with everything that an export needs.

    Raises:
        CheckpointError: The checkpoint cannot be found or downloaded, is not a Florence-2, or its weights, config and
            tokenizer do not fit each other; its weights are quantized or not finite; it generates with settings that
            the runtime does not know. A non-zero `final_logits_bias` is refused, because the native class has no
            such bias (it is zero in all published checkpoints).
        MissingExtraError: There is an adapter, and PEFT is not installed.
    """
    folder = find_folder(source, revision)
    if adapter is not None:
        return _load_with_adapter(source, folder, read_adapter(find_folder(adapter, None)), folder, processor)
    if find_adapter(folder):
        found = read_adapter(folder)
        base_folder = find_base(found, base)
        return _load_with_adapter(source, folder, found, base_folder, processor)
    if base is not None:
        raise CheckpointError(
            f"{folder} is no adapter (it has no {ADAPTER_CONFIG} with adapter_model.safetensors), so it needs no base"
        )
    return _load(source, folder, processor)


def find_base(adapter: Adapter, base: Source | None) -> Path:
    wanted = base or adapter.base
    if wanted is None:
        raise CheckpointError(f"{adapter.folder}/{ADAPTER_CONFIG} names no base model; give it with --base")
    try:
        return find_folder(wanted, adapter.config.get("revision") if base is None else None)
    except CheckpointError as error:
        advice = (
            ""
            if base is not None
            else f"; {ADAPTER_CONFIG} names it as the base model of the adapter: give it with --base"
        )
        raise CheckpointError(f"{error}{advice}") from error


def _load_with_adapter(
    source: Source, folder: Path, adapter: Adapter, base_folder: Path, processor: Source | None
) -> Checkpoint:
    # An adapter's folder often has the tokenizer and the preprocessing that it was trained with.
    places = [adapter.folder, base_folder]
    base = _load(source, base_folder, processor, places)
    reference = functools.partial(_load_base_with_adapter, base_folder, processor, places, adapter)
    model = attach_adapter(base.model, adapter, merge=True)
    origin = {**base.source, **_origin(source, folder), "adapter": adapter.folder.resolve().name}
    notes = (*base.notes, f"{adapter.kind} adapter {adapter.folder.name} is merged into {base_folder.name}")
    return Checkpoint(model, base.tokenizer, base.generation, base.preprocessing, origin, notes, reference)


def _load_base_with_adapter(
    folder: Path, processor: Source | None, places: list[Path], adapter: Adapter
) -> Florence2ForConditionalGeneration:
    return attach_adapter(_load(folder, folder, processor, places).reference, adapter, merge=False)


def _load(source: Source, folder: Path, processor: Source | None, places: list[Path] | None = None) -> Checkpoint:
    """Loads a folder with whole weights.

    Args:
        source: As the user gave it.
        folder: Where it lies.
        processor: Where the tokenizer and the preprocessing are, if the user said so.
        places: Where they may be otherwise, best first.
    """
    places = [find_folder(processor, None, with_weights=False)] if processor is not None else places or []
    config_json = read_config(folder)
    is_microsoft = microsoft.is_microsoft(config_json)
    config = build_config(config_json, is_microsoft)
    preprocessing = read_preprocessing(_first(has_preprocessing, places, folder))
    settings = read_settings(folder, config, config_json, is_microsoft=is_microsoft)
    settings.check(folder, model_sizes(config, preprocessing))
    token_ids = stated_ids(config, settings)
    tokenizer = load_tokenizer(_first(has_tokenizer, places, folder), config.text_config.vocab_size, token_ids)
    stored, prefixes = strip_prefixes(read_weights(folder))
    check_not_quantized(folder, config_json, stored)
    adapter = None
    if is_unmerged(stored):
        stored, adapter = split_unmerged(folder, stored)
    dtype = _common_dtype(stored)
    layout = microsoft.LAYOUT if is_microsoft else NATIVE

    def build(weights: Weights) -> Florence2ForConditionalGeneration:
        model = build_model(config, weights, layout)
        # Microsoft's embedding has no row for `<image>`. Image features overwrite the placeholder's embeddings, so any
        # token will do that does not occur in text: byte-level BPE has no use for <unk>.
        model.config.image_token_id = tokenizer.token_to_id("<unk>") if is_microsoft else config.image_token_id
        model.generation_config = settings.effective
        return model

    model = build(stored)
    reference: Callable[[], Florence2ForConditionalGeneration | None] = _no_model
    notes = [*settings.notes, *token_notes(folder, settings, tokenizer), *_prefix_notes(folder, prefixes)]
    if adapter is not None:
        # read again, because merging changes the weights in place
        reference = functools.partial(_load_unmerged, folder, build)
        model = attach_adapter(model, adapter, merge=True)
        notes.append(f"{adapter.kind} adapter in the weights of {folder.name} is merged")
    elif not is_microsoft and not prefixes and not (folder / ADAPTER_CONFIG).is_file():
        # where PEFT is installed, transformers would look for the base model that an adapter_config.json names
        reference = functools.partial(_load_original, folder, model, settings)
    for note in notes:
        _log.warning(note)
    origin = {
        **_origin(source, folder),
        "layout": "microsoft" if is_microsoft else "transformers",
        "dtype": dtype,
        "adapter": None if adapter is None else folder.resolve().name,
        "transformers_version": transformers.__version__,
    }
    return Checkpoint(model, tokenizer, settings.values, preprocessing, origin, tuple(notes), reference)


def _no_model() -> None:
    """What loads the reference of a checkpoint that no library but this one reads."""


def _load_unmerged(
    folder: Path, build: Callable[[Weights], Florence2ForConditionalGeneration]
) -> Florence2ForConditionalGeneration:
    base, adapter = split_unmerged(folder, strip_prefixes(read_weights(folder))[0])
    return attach_adapter(build(base), adapter, merge=False)


def _load_original(
    folder: Path, model: Florence2ForConditionalGeneration, settings: GenerationSettings
) -> Florence2ForConditionalGeneration | None:
    original = load_original(folder, settings.effective)
    if original is not None:
        share_weights(original, model)
    return original


def _first(has: Callable[[Path], bool], places: list[Path], folder: Path) -> Path:
    return next((place for place in (*places, folder) if has(place)), folder)


def stated_ids(config: Florence2Config, settings: GenerationSettings) -> dict[str, list[int]]:
    """All ids that the generation settings and both levels of config.json give for the tokenizer's special tokens."""
    found = {}
    for name in SPECIAL_TOKENS:
        values = (settings.values[name], getattr(config, name, None), getattr(config.text_config, name, None))
        ids = [each for value in values for each in (value if isinstance(value, list) else [value])]
        found[name] = list(dict.fromkeys(each for each in ids if each is not None))
    return found


def token_notes(folder: Path, settings: GenerationSettings, tokenizer: Tokenizer) -> list[str]:
    """Where answers end at another token than the tokenizer's."""
    other = []
    for name, token in SPECIAL_TOKENS.items():
        stated = settings.values[name]
        if tokenizer.token_to_id(token) not in (stated if isinstance(stated, list) else [stated]):
            other.append(f"{name} {stated} ({tokenizer.id_to_token(stated)})")
    if not other:
        return []
    return [
        f"{folder.name}/{settings.file} says {', '.join(other)}, which are other tokens than the tokenizer's "
        f"{', '.join(SPECIAL_TOKENS.values())}. transformers' native class obeys that, and so does the export. If "
        "answers run on to "
        "the limit, correct that file and export again"
    ]


def _prefix_notes(folder: Path, prefixes: list[str]) -> list[str]:
    return (
        [f"all weights of {folder.name} are stored under the prefix {''.join(prefixes)}, which is left out"]
        if prefixes
        else []
    )


def _origin(source: Source, folder: Path) -> dict[str, str | None]:
    facts = read_facts(folder)
    if Path(source).is_dir():
        return {"name": folder.resolve().name, "revision": None, **facts}
    # huggingface_hub names a snapshot's folder after its commit.
    return {"name": os.fspath(source), "revision": folder.name, **facts, "base_model": os.fspath(source)}


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        CheckpointError: There is none, or it is not Florence-2's.
    """
    config = read_json(folder, "config.json")
    if config is None:
        if (folder / ADAPTER_CONFIG).is_file():
            raise CheckpointError(
                f"{folder} has {ADAPTER_CONFIG} but no adapter_model.safetensors; copy it into the folder"
            )
        raise CheckpointError(f"{folder} has no config.json; give the folder of a Florence-2 checkpoint")
    if config.get("model_type") != "florence2":
        raise CheckpointError(f"{folder} is not a Florence-2 checkpoint: model_type is {config.get('model_type')!r}")
    for section in ("vision_config", "text_config"):
        if not isinstance(config.get(section), dict):
            raise CheckpointError(f"{folder}/config.json has no {section}; it is not a complete Florence-2 config")
    return config


def build_config(config: dict[str, Any], is_microsoft: bool) -> Florence2Config:
    """Builds the config of transformers' class from a config.json of either layout.

    Raises:
        CheckpointError: transformers refuses it, or its parts do not fit each other.
    """
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


def build_model(config: Florence2Config, stored: Weights, layout: Layout) -> Florence2ForConditionalGeneration:
    """Builds transformers' class around stored weights.

    Raises:
        CheckpointError: The config describes no possible model, or the weights do not fit it.
    """
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
