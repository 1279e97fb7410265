"""Adapters of PEFT (LoRA and its relatives): merged into their base model by PEFT itself.

An adapter names the modules of the model that it was trained on, which may have been Microsoft's class or transformers'
native one. So PEFT is given a tree of the native model's own layers under the names of that class: patterns, ranks per
layer, `modules_to_save` and every kind of adapter that PEFT can merge mean what they meant in training. The layers are
then put back.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Florence2ForConditionalGeneration

from florence_onnx.errors import CheckpointError, MissingExtraError

from . import microsoft
from .json_files import read_json
from .weight_files import read_named_weights
from .weights import Layout, Weights

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
_MICROSOFT_ROOTS = ("language_model.", "vision_tower.", "image_proj", "image_pos_embed.", "visual_temporal_embed.")
_NAME = "default"
"""PEFT's name of the only adapter."""


@dataclass(frozen=True)
class Adapter:
    """A trained adapter, read but not applied."""

    folder: Path
    config: dict[str, Any]
    """adapter_config.json."""
    weights: Weights
    """By PEFT's names, such as
    `base_model.model.language_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight`."""

    @property
    def kind(self) -> str:
        """PEFT's `peft_type`, such as `LORA`."""
        return str(self.config.get("peft_type"))

    @property
    def base(self) -> str | None:
        """Folder or hub id of the base model, as the trainer named it."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def is_microsoft(self) -> bool:
        """Whether it was trained on Microsoft's class."""
        return any(name.removeprefix(_PREFIX).startswith(_MICROSOFT_ROOTS) for name in self.weights)


def find_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter as PEFT writes it."""
    return (folder / ADAPTER_CONFIG).is_file() and any((folder / name).is_file() for name in ADAPTER_WEIGHTS)


def read_adapter(folder: Path) -> Adapter:
    """Reads a folder as PEFT writes it.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    config = read_json(folder, ADAPTER_CONFIG)
    name = next((name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if config is None or name is None:
        raise CheckpointError(
            f"{folder} is no adapter as PEFT writes it: it needs {ADAPTER_CONFIG} and {' or '.join(ADAPTER_WEIGHTS)}"
        )
    return Adapter(folder, config, read_named_weights(folder, name))


def is_unmerged(stored: Weights) -> bool:
    """Whether a state dict holds a base model and an adapter that was not merged into it."""
    return any(".lora_" in name or ".base_layer." in name for name in stored)


def split_unmerged(folder: Path, stored: Weights) -> tuple[Weights, Adapter]:
    """Separates the state dict of a model with live adapter layers into its base model and the adapter.

    Args:
        folder: The checkpoint, which must hold the adapter's config too: weights do not tell `lora_alpha`.
        stored: Tensors by name, without a common prefix.

    Raises:
        CheckpointError: There is no adapter_config.json.
    """
    config = read_json(folder, ADAPTER_CONFIG)
    if config is None:
        raise CheckpointError(
            f"{folder} holds an adapter that is not merged (such as "
            f"{next(n for n in stored if '.lora_' in n or 'base_layer' in n)}), "
            f"and no {ADAPTER_CONFIG}, which tells its scale. Copy the {ADAPTER_CONFIG} of the training into the "
            "folder, or merge "
            "before saving: model = model.merge_and_unload(); model.save_pretrained(…)"
        )
    base: Weights = {}
    own: Weights = {}
    for name, tensor in stored.items():
        if f".modules_to_save.{_NAME}." in name:
            own[_PREFIX + name.replace(f".modules_to_save.{_NAME}.", ".")] = tensor
        elif f".{_NAME}" in name and ".base_layer." not in name:
            own[_PREFIX + name.replace(f".{_NAME}", "", 1)] = tensor
        else:
            base[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return base, Adapter(folder, config, own)


def attach_adapter(
    model: Florence2ForConditionalGeneration, adapter: Adapter, *, merge: bool
) -> Florence2ForConditionalGeneration:
    """Applies an adapter to a model, in place.

    Args:
        model: The base model. Its embeddings and its head become separate parameters, because an adapter may change one
            of them.
        adapter: What to apply.
        merge: Whether its weights are added to the base model's, which leaves plain layers; otherwise PEFT's own layers
            compute both, as in training.

    Returns:
        `model`.

    Raises:
        CheckpointError: The adapter does not fit the model, or cannot be merged.
        MissingExtraError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "peft") from error
    _untie(model)
    names = _names_of_layers(model, microsoft.LAYOUT if adapter.is_microsoft else Layout(stored_name=str))
    tree = _build_tree(model, names)
    config = _read_config(peft, adapter)
    try:
        tuned = peft.PeftModel(tree, config)
        needed = set(peft.get_peft_model_state_dict(tuned, save_embedding_layers=False))
        # where an embedding or the head is trained, PEFT stores the base model's embeddings beside the adapter
        allowed = {name.replace(f".{_NAME}", "", 1) for name in tuned.state_dict()}
        _check_names(adapter, needed, allowed)
        peft.set_peft_model_state_dict(tuned, adapter.weights)
        tuned.eval()
        result = tuned.merge_and_unload() if merge else tuned.get_base_model()
    except CheckpointError:
        raise
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
        raise CheckpointError(
            f"PEFT cannot apply the adapter {adapter.folder}: {type(error).__name__}: "
            f"{textwrap.shorten(str(error), 400)}"
        ) from error
    for native, name in names.items():
        parent, _, last = native.rpartition(".")
        setattr(model.get_submodule(parent), last, _find(result, name))
    if merge:
        bart = model.model.language_model
        # Florence-2 embeds prompts with `shared`; the encoder's own table is never read
        bart.encoder.embed_tokens.weight = bart.shared.weight
        _tie_again(model)
    model.train(False).requires_grad_(False)
    return model


def _read_config(peft: Any, adapter: Adapter) -> Any:
    config = peft.PeftConfig.from_pretrained(str(adapter.folder))
    if config.is_prompt_learning or getattr(config, "peft_type", None) == "CPT":
        raise CheckpointError(
            f"{adapter.folder} is an adapter of type {adapter.kind}, which adds tokens instead of changing weights and "
            "cannot be "
            "merged; florence_onnx exports adapters that PEFT can merge, such as LORA"
        )
    # of the wrappers by task, which want a transformers model, none is needed to merge
    config.task_type = None
    config.inference_mode = True
    return config


def _check_names(adapter: Adapter, needed: set[str], allowed: set[str]) -> None:
    unknown, missing = sorted(adapter.weights.keys() - needed - allowed), sorted(needed - adapter.weights.keys())
    for fault, names in (("has weights that the base model has no place for", unknown), ("lacks weights", missing)):
        if names:
            rest = " …" if len(names) > 5 else ""
            raise CheckpointError(f"the adapter {adapter.folder} {fault} ({len(names)}): {', '.join(names[:5])}{rest}")


def _untie(model: Florence2ForConditionalGeneration) -> None:
    bart = model.model.language_model
    for layer in (bart.encoder.embed_tokens, bart.decoder.embed_tokens, model.lm_head):
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def _tie_again(model: Florence2ForConditionalGeneration) -> None:
    """Shares what is still equal after a merge, so that it is exported once."""
    shared = model.model.language_model.shared
    for layer in (model.model.language_model.decoder.embed_tokens, model.lm_head):
        if torch.equal(layer.weight, shared.weight):
            layer.weight = shared.weight


def _names_of_layers(model: nn.Module, layout: Layout) -> dict[str, str]:
    """Native to stored names of all layers that hold weights."""
    found = {}
    for native, layer in _layers(model):
        weight = next(iter(layer.state_dict()))
        found[native] = layout.stored_name(f"{native}.{weight}").removesuffix(f".{weight}")
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if not list(module.children()) and module.state_dict():
            yield name, module


def _build_tree(model: nn.Module, names: dict[str, str]) -> nn.Module:
    root = nn.Module()
    for native, name in names.items():
        parent = root
        *path, last = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]  # type: ignore[assignment]
        parent.add_module(last, model.get_submodule(native))
    return root


def _find(root: nn.Module, name: str) -> nn.Module:
    """A layer by its path; where PEFT keeps a trained copy of a module beside the original, the copy is meant."""
    found = _trained(root)
    for part in name.split("."):
        found = _trained(found.get_submodule(part))
    return found


def _trained(module: nn.Module) -> nn.Module:
    copies = module._modules.get("modules_to_save")
    return copies[_NAME] if isinstance(copies, nn.ModuleDict) and _NAME in copies else module
