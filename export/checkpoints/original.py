"""The checkpoint as transformers itself loads it: what an export is verified against.

This model is read independently of `weights` and `generation`. Whatever those would drop or misread is therefore not
missing on both sides of a comparison.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import Florence2ForConditionalGeneration, GenerationConfig
from transformers.utils import logging as transformers_logging

from florence_onnx.errors import CheckpointError

_log = logging.getLogger("florence_onnx")


def load_original(folder: Path, effective: GenerationConfig) -> Florence2ForConditionalGeneration | None:
    """Loads a folder in the native layout with transformers' own `from_pretrained`, including its
    generation_config.json.

    Args:
        folder: The checkpoint.
        effective: All of its generation settings, for what that file has as null or not at all: transformers 4.57
            cannot generate
            with a null that stands for a number, nor without a start token.

    Returns:
        The model in float32 on the CPU, in eval mode; None where transformers does not find all weights in the folder,
        because they are stored under a prefix that only this package reads.

    Raises:
        CheckpointError: transformers cannot load the folder.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it announces every weight that it does not find
    try:
        model, info = Florence2ForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            generation_config=None if _can_be_read(folder) else effective,
        )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"transformers cannot load {folder} itself, so there is nothing to verify an export against: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        transformers_logging.set_verbosity(level)
    # of an embedding that is stored under another of its names, transformers 4.57 leaves an empty parameter
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    strange = [*info["missing_keys"], *info["mismatched_keys"], *empty]
    if strange:
        _log.info("transformers misses %d weights in %s, first %s", len(strange), folder, strange[0])
        return None
    for name, value in effective.to_dict().items():
        if getattr(model.generation_config, name, None) is None and not name.startswith("_"):
            setattr(model.generation_config, name, value)
    return model.eval().requires_grad_(False)


def _can_be_read(folder: Path) -> bool:
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except TypeError:  # a null is compared with a number
        return False
    except OSError:  # there is no such file
        return True
    return True


def share_weights(original: Florence2ForConditionalGeneration, model: Florence2ForConditionalGeneration) -> None:
    """Lets a model use the memory of another's weights, after comparing them bit by bit.

    Args:
        original: As transformers loaded it; its own copies are released.
        model: As this package loaded it.

    Raises:
        CheckpointError: A weight differs.
    """
    ours = model.state_dict()
    for name, tensor in original.state_dict().items():
        if torch.equal(tensor, ours[name]):
            continue
        if name == "lm_head.weight":
            raise CheckpointError(
                "lm_head.weight is stored apart from the token embedding, and config.json says tie_word_embeddings "
                "false, but its "
                "text_config does not: transformers ties them and ignores the head. Set it false in text_config too"
            )
        raise CheckpointError(
            f"{name} is not what transformers' from_pretrained reads from the same folder. This is a defect of "
            "florence_onnx; please "
            "report it with the list of the folder's weights"
        )
    for name, parameter in original.named_parameters():
        parameter.data = ours[name]
