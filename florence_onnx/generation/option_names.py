"""Which of transformers' generation settings are options here, which are refused, and which are ignored.

Everything that `generate` of transformers 4.57 obeys is an option or refused by name; what it ignores for this model, or what
only says how it computes, is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from florence_onnx.errors import OptionsError
from florence_onnx.generation.options import OPTION_NAMES, GenerationOptions

_HUB = "transformers 4.57 itself no longer has it (it moved to code on the hub)"
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beam_groups": (lambda value: value != 1, f"diverse beam search is not implemented; {_HUB}. Use do_sample"),
    "diversity_penalty": (lambda value: value != 0, f"diverse beam search is not implemented; {_HUB}. Use do_sample"),
    "constraints": (bool, f"constrained beam search is not implemented; {_HUB}"),
    "force_words_ids": (bool, f"constrained beam search is not implemented; {_HUB}"),
    "penalty_alpha": (lambda value: value != 0, f"contrastive search is not implemented; {_HUB}"),
    "dola_layers": (lambda value: True, f"DoLa is not implemented; {_HUB}"),
    "guidance_scale": (lambda value: value != 1, "guidance needs a second prompt, which Florence-2 does not have"),
    "watermarking_config": (bool, "watermarks are not implemented"),
    "stop_strings": (bool, "answers end at tokens here: use eos_token_id, or cut the text"),
    "max_time": (lambda value: True, "answers must not depend on the speed of a machine: use max_new_tokens"),
    "token_healing": (bool, "prompts of Florence-2 are whole: there is nothing to heal"),
    "low_memory": (bool, "transformers 4.57 refuses it too"),
}
"""When a setting changes answers in a way that is not implemented, and why or what to do instead."""
_IGNORED = {
    *("use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "transformers_version", "_from_model_config", "_commit_hash"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("pad_token_id", "bos_token_id", "max_length"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
}
"""`max_length` is among them because `max_new_tokens`, which always has a value here, overrules it."""


def check_refused(values: Mapping[str, Any]) -> None:
    """Looks for settings that change answers and are not implemented.

    Args:
        values: Settings by transformers' names, such as a generation_config.json; others are not looked at.

    Raises:
        OptionsError: There is one.
    """
    for name, (is_active, reason) in _REFUSED.items():
        value = values.get(name)
        if value is not None and is_active(value):
            raise OptionsError(f"{name}={value!r} is not possible: {reason}")


def is_option(name: str) -> bool:
    """Whether a name is that of an option, or of a setting that is refused."""
    return name in OPTION_NAMES or name in _REFUSED


def parse_options(values: Mapping[str, Any]) -> GenerationOptions:
    """Options by transformers' names, as JSON has them; their values are checked by `GenerationDefaults.resolve`.

    Args:
        values: Value by name; None takes the checkpoint's.

    Raises:
        OptionsError: A name is not known, or its setting is not implemented.
    """
    check_refused(values)
    for name in values:
        if name not in OPTION_NAMES and name not in _REFUSED and name not in _IGNORED:
            raise OptionsError(_unknown(name))
    return GenerationOptions(**{name: value for name, value in values.items() if name in OPTION_NAMES})


def _unknown(name: str) -> str:
    import difflib  # takes time to import, and only mistakes need it

    near = difflib.get_close_matches(name, OPTION_NAMES, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(OPTION_NAMES)}"
    return f"there is no option {name!r}{meant}"
