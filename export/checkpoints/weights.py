"""Mapping the stored tensors of a checkpoint to the weights of transformers' native class, each accounted for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from florence_onnx.errors import CheckpointError

Weights = dict[str, torch.Tensor]
"""Tensors by name."""

LOGITS_BIAS = "language_model.final_logits_bias"
"""A buffer of BART's class, zero in all published checkpoints; the native class does not have it."""

_EMBEDDINGS = (
    "model.language_model.shared.weight",
    "model.language_model.encoder.embed_tokens.weight",
    "model.language_model.decoder.embed_tokens.weight",
)
_HEAD = "lm_head.weight"


_PREFIXES = ("module.", "_orig_mod.", "base_model.model.")
"""What DistributedDataParallel, torch.compile and PEFT put before every name."""
_COMPILED = "_orig_mod."
"""torch.compile of a part of the model puts it inside the names of that part."""


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names and stores the weights.

    Example: `Layout(stored_name=str)` stores them under their native names.
    """

    stored_name: Callable[[str], str]
    """Maps a native name to the stored one."""
    transposed: frozenset[str] = frozenset()
    """Native names of the weights that are stored transposed."""


NATIVE = Layout(stored_name=str)
"""transformers' native layout."""


def strip_prefixes(stored: Weights) -> tuple[Weights, list[str]]:
    """Removes what wrappers of a model put before the names of its weights.

    Returns:
        The weights, and the prefixes that were removed, outermost first.

    Raises:
        CheckpointError: Two weights have the same name without it.
    """
    found: list[str] = []
    names = {name: name for name in stored}
    while prefix := _common_prefix(names.values()):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
        found.append(prefix)
    if any(_COMPILED in short for short in names.values()):
        names = {name: short.replace(_COMPILED, "") for name, short in names.items()}
        found.append(_COMPILED)
    stripped = {short: stored[name] for name, short in names.items()}
    if len(stripped) != len(stored):
        raise CheckpointError(
            f"the checkpoint has weights that are the same name without the prefix {' '.join(found)}: save the model "
            "once more, "
            "unwrapped"
        )
    return stripped, found


def _common_prefix(names: Collection[str]) -> str | None:
    return next((each for each in _PREFIXES if names and all(name.startswith(each) for name in names)), None)


def native_weights(stored: Weights, shapes: Mapping[str, torch.Size], layout: Layout, *, is_tied: bool) -> Weights:
    """Returns all weights of the native class.

    Args:
        stored: Tensors by stored name, of any float dtype.
        shapes: The shapes that the class expects, by native name.
        layout: How `stored` is named.
        is_tied: Whether the config ties the language model head to the token embedding.

    Returns:
        float32 tensors by native name; the token embedding is one tensor under all its names.

    Raises:
        CheckpointError: Weights are missing, unknown, of the wrong shape or type, or contradict each other. The message
            lists them.
    """
    _refuse_not_finite(stored)
    _check_logits_bias(stored)
    names = {native: layout.stored_name(native) for native in shapes}
    required = {native: name for native, name in names.items() if native not in (*_EMBEDDINGS, _HEAD)}
    _refuse("lacks weights", sorted(set(required.values()) - stored.keys()))
    _refuse("has unknown weights", sorted(stored.keys() - {*names.values(), LOGITS_BIAS}))
    _refuse("has weights of the wrong shape or type", _misfits(stored, shapes, names, layout.transposed))
    weights = {}
    for native, name in required.items():
        weights[native] = _float32(stored[name].T if native in layout.transposed else stored[name])
    return {**weights, **_embeddings(stored, names, is_tied=is_tied)}


def _refuse_not_finite(stored: Weights) -> None:
    faults = find_not_finite(stored)
    if faults:
        rest = " …" if len(faults) > 10 else ""
        raise CheckpointError(
            f"the checkpoint has weights that are not finite ({len(faults)}): {', '.join(faults[:10])}{rest}. The "
            "training diverged, "
            "or they were too large for the type that they were saved in: take an earlier checkpoint, or save it in "
            "float32 or bfloat16"
        )


def find_not_finite(weights: Weights) -> list[str]:
    """Names the tensors that hold NaN or infinity, and how many of each."""
    found = []
    for name, tensor in weights.items():
        # a sum is finite only if all its terms are, and much faster than a mask; float64 so that it cannot overflow
        # itself
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
            num_nan, num_inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            counts = [f"{count} {kind}" for count, kind in ((num_nan, "NaN"), (num_inf, "infinite")) if count]
            found.append(f"{name} ({', '.join(counts)} of {tensor.numel()})")
    return found


def _refuse(fault: str, names: Sequence[str]) -> None:
    if names:
        rest = " …" if len(names) > 10 else ""
        raise CheckpointError(f"the checkpoint {fault} ({len(names)}): {', '.join(names[:10])}{rest}")


def _misfits(
    stored: Weights, shapes: Mapping[str, torch.Size], names: Mapping[str, str], transposed: frozenset[str]
) -> list[str]:
    misfits = []
    for native, shape in shapes.items():
        tensor = stored.get(names[native])
        wanted = shape[::-1] if native in transposed else shape
        if tensor is not None and tensor.shape != wanted:
            misfits.append(f"{names[native]} {list(tensor.shape)} instead of {list(wanted)}")
        elif tensor is not None and not tensor.is_floating_point():
            misfits.append(f"{names[native]} {tensor.dtype} instead of a float type")
    return misfits


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32).contiguous()


def _check_logits_bias(stored: Weights) -> None:
    bias = stored.get(LOGITS_BIAS)
    if bias is not None and bool(bias.count_nonzero()):
        raise CheckpointError(
            f"{LOGITS_BIAS} is not zero (up to {float(bias.abs().max()):.3g}); transformers' Florence-2 adds no bias "
            "to "
            "the logits, so this checkpoint cannot be reproduced"
        )


def _embeddings(stored: Weights, names: Mapping[str, str], *, is_tied: bool) -> Weights:
    """Returns the token embedding under its three names, and the language model head, from those that are stored.

    BART's encoder, decoder and (where tied) head share one tensor. A checkpoint may store it once, under any of its
    names.
    """
    inputs = [names[native] for native in _EMBEDDINGS if names[native] in stored]
    head = names[_HEAD]
    if not inputs and (not is_tied or head not in stored):
        _refuse("lacks weights", [names[_EMBEDDINGS[0]]])
    if not is_tied and head not in stored:
        _refuse("lacks weights", [f"{head} (tie_word_embeddings is false in config.json)"])
    first = inputs[0] if inputs else head
    different = [name for name in inputs if not torch.equal(stored[name], stored[first])]
    if different:
        raise CheckpointError(
            f"{first} and {', '.join(different)} differ; Florence-2's encoder and decoder share one embedding"
        )
    embedding = _float32(stored[first])
    if is_tied and head in stored and not torch.equal(stored[head], stored[first]):
        raise CheckpointError(
            f"{head} differs from {first}, but config.json ties them; if the head is meant to be separate, set "
            '"tie_word_embeddings": false in config.json and in its text_config'
        )
    return {**dict.fromkeys(_EMBEDDINGS, embedding), _HEAD: embedding if is_tied else _float32(stored[head])}
