"""The checkpoint as transformers itself loads it: what an export is verified against.

This model is read independently of `weights` and `generation`. Whatever those would drop or misread is therefore not missing on both
sides of a comparison.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import Florence2ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from florence_onnx.errors import CheckpointError

_log = logging.getLogger("florence_onnx")


def load_original(folder: Path) -> Florence2ForConditionalGeneration | None:
    """Loads a folder in the native layout with transformers' own `from_pretrained`, including its generation_config.json.

    Returns:
        The model in float32 on the CPU, in eval mode; None where transformers does not find all weights in the folder, because they
        are stored under a prefix that only this package reads.

    Raises:
        CheckpointError: transformers cannot load the folder.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it announces every weight that it does not find
    try:
        model, info = Florence2ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"transformers cannot load {folder} itself, so there is nothing to verify an export against: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        transformers_logging.set_verbosity(level)
    strange = [*info["missing_keys"], *info["mismatched_keys"]]
    if strange:
        _log.info("transformers misses %d weights in %s, first %s", len(strange), folder, strange[0])
        return None
    return model.eval().requires_grad_(False)


def share_weights(original: Florence2ForConditionalGeneration, model: Florence2ForConditionalGeneration) -> None:
    """Lets a model use the memory of another's weights, after comparing them bit by bit.

    Args:
        original: As transformers loaded it; its own copies are released.
        model: As this package loaded it.

    Raises:
        CheckpointError: A weight differs.
    """
    ours = dict(model.named_parameters())
    for name, parameter in original.named_parameters():
        if not torch.equal(parameter, ours[name]):
            raise CheckpointError(
                f"{name} is not what transformers' from_pretrained reads from the same folder. This is a defect of florence_onnx; "
                "please report it with the list of the folder's weights"
            )
        parameter.data = ours[name].data
