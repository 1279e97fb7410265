"""How a checkpoint generates: the settings that its own `generate` would obey, and which of them the runtime can.

The settings are those that transformers reads, and the runtime is asked which of them it knows: the fields of
`GenerationOptions` have transformers' names. Whatever else `generate` would obey is refused by name, so that a bundle
never answers otherwise than its checkpoint in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Florence2Config, GenerationConfig

from florence_onnx.bundles.bundle import ModelSizes, generation_defaults
from florence_onnx.errors import BundleFormatError, CheckpointError
from florence_onnx.generation.options import GenerationOptions

from .json_files import read_json

GENERATION_CONFIG = "generation_config.json"

GENERATION_DEFAULTS: dict[str, Any] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "early_stopping": False,
    "length_penalty": 1.0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
"""Settings that are always exported: transformers' own defaults, and Florence-2's token ids."""

TOKEN_IDS = ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")

_TOKENS = (*TOKEN_IDS, "forced_bos_token_id", "forced_eos_token_id")
_MAY_BE_SEVERAL = ("eos_token_id", "forced_eos_token_id")
"""Of which transformers takes a list."""

_NOT_INHERITED = {"max_length", "max_new_tokens"}
"""Kept for information: the checkpoints that carry one mean a sample, not a limit. A call's limit is `max_new_tokens`,
1024 by default."""

_WITHOUT_EFFECT = {
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    "is_assistant",
    "low_memory",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "return_dict_in_generate",
    "return_legacy_cache",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
}
"""Settings of `generate` that change its speed or the form of its output, never the tokens."""

SAMPLING_ONLY = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
"""What `generate` obeys only with `do_sample`."""

_NEUTRAL: dict[str, Any] = {"guidance_scale": 1}
"""Values that change nothing, beside the default and everything that is empty, zero or false."""

_MICROSOFT_DEFAULTS: dict[str, Any] = {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
"""The defaults of Microsoft's text config."""


@dataclass(frozen=True)
class GenerationSettings:
    """How a checkpoint generates.

    Example: `read_settings(folder, config, config_json, is_microsoft=True).values["num_beams"]` is 3.
    """

    values: dict[str, Any]
    """All keys of `GENERATION_DEFAULTS`, and those other settings that the runtime knows and that depart from
    transformers' defaults. A list with a single token id is that id."""
    file: str
    """Where they come from, for messages."""
    refused: dict[str, Any]
    """Settings that `generate` would obey and the runtime does not know."""
    filled: dict[str, Any]
    """Token ids that generation_config.json lacks although `generate` needs them; taken from config.json."""
    effective: GenerationConfig
    """All settings of the checkpoint, for transformers, also those that are refused."""
    notes: tuple[str, ...] = ()
    """What is unusual, each a sentence for the user."""

    def check(self, folder: Path, sizes: ModelSizes) -> None:
        """Refuses what the runtime would not obey.

        Raises:
            CheckpointError: There is such a setting, or a value that the runtime does not take; the message names it
                and the file.
        """
        if self.refused:
            said = ", ".join(f"{name} = {value!r}" for name, value in self.refused.items())
            raise CheckpointError(
                f"{folder / self.file} sets {said}, which transformers' generate obeys and florence_onnx does not "
                "know. "
                f"If the answers without it are good enough, remove it from {self.file} and export again"
            )
        several = [name for name in self.values if isinstance(self.values[name], list) and name in _MAY_BE_SEVERAL]
        try:
            generation_defaults(self.values, sizes, folder)
        except (BundleFormatError, TypeError) as error:
            said = ", ".join(f"{name} = {self.values[name]}" for name in several)
            advice = (
                f": it sets {said}, and florence_onnx takes a single token there; leave one in {self.file}"
                if said
                else ""
            )
            raise CheckpointError(f"{folder / self.file} cannot be exported{advice} ({error})") from error


def read_settings(
    folder: Path, config: Florence2Config, config_json: Mapping[str, Any], *, is_microsoft: bool
) -> GenerationSettings:
    """Reads the settings that the checkpoint's own `generate` would use.

    In Microsoft's layout `generate` is that of the inner language model. It follows `text_config` and never reads
    generation_config.json, which in Microsoft's repositories says `early_stopping: false` where `true` is in effect. In
    the native layout it follows generation_config.json alone; where there is no such file, transformers takes the
    settings from config.json.

    Args:
        folder: The checkpoint.
        config: Its config in transformers' layout.
        config_json: Its config.json.
        is_microsoft: Whether it is in Microsoft's layout.

    Raises:
        CheckpointError: A file is damaged, or transformers refuses its values.
    """
    own = read_json(folder, GENERATION_CONFIG)
    file = "config.json" if own is None or is_microsoft else GENERATION_CONFIG
    try:
        if is_microsoft:
            effective = _from_values({**_MICROSOFT_DEFAULTS, **_stated(config_json.get("text_config") or {})})
        elif own is None:
            effective = GenerationConfig.from_model_config(config)
        else:
            effective = _from_values(_stated(own))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{folder / file}: transformers refuses its generation settings: {error}") from error
    stated = {name: _single(value) if name in _TOKENS else value for name, value in effective.to_dict().items()}
    filled = {} if file == "config.json" else _fill(stated, config)
    effective.update(**filled)
    values, refused = _sort(stated | filled)
    missing = dict(filled)
    if stated.get("bos_token_id") is not None:
        missing.pop("decoder_start_token_id", None)  # transformers itself then starts with `bos_token_id`
    notes = [*_fill_notes(folder, missing), *_ignored_notes(folder, own if is_microsoft else None, values)]
    notes += [
        f"{folder.name}/{file} says {name} {stated[name]}; it is not taken over: a call's limit is max_new_tokens, "
        "1024 by default"
        for name in sorted(_NOT_INHERITED)
        if stated.get(name) not in (None, 20)
    ]
    return GenerationSettings(values, file, refused, filled, effective, tuple(notes))


def _stated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings among the values of a file; transformers 5 writes null where nothing is set."""
    known = GenerationConfig().to_dict()
    return {name: value for name, value in values.items() if name in known and value is not None}


def _from_values(values: Mapping[str, Any]) -> GenerationConfig:
    return GenerationConfig(**{name: value for name, value in values.items() if not name.startswith("_")})


def _single(value: Any) -> Any:
    """transformers' Trainer writes `[2]` for 2."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], int) else value


def _fill(stated: Mapping[str, Any], config: Florence2Config) -> dict[str, Any]:
    """The token ids without which `generate` cannot start, or never ends, from config.json."""
    # generate begins with the start token, or else with `bos_token_id`
    own = {"decoder_start_token_id": stated.get("bos_token_id")}
    found = {}
    for name in TOKEN_IDS:
        if stated.get(name) is None:
            given = own.get(name), getattr(config, name, None), getattr(config.text_config, name, None)
            found[name] = next((_single(value) for value in given if value is not None), GENERATION_DEFAULTS[name])
    return found


def _fill_notes(folder: Path, filled: Mapping[str, Any]) -> list[str]:
    missing = {name: value for name, value in filled.items() if name in ("decoder_start_token_id", "eos_token_id")}
    if not missing:
        return []
    said = ", ".join(f"{name} {value}" for name, value in missing.items())
    return [f"{folder.name}/{GENERATION_CONFIG} lacks {', '.join(missing)}; {said} of config.json is taken"]


def _ignored_notes(folder: Path, ignored: Mapping[str, Any] | None, values: Mapping[str, Any]) -> list[str]:
    """What a generation_config.json says to no effect about token ids, which decides where answers end."""
    if ignored is None:
        return []
    other = {name: ignored[name] for name in TOKEN_IDS if _single(ignored.get(name)) not in (None, values[name])}
    if not other:
        return []
    said = ", ".join(f"{name} {value}" for name, value in other.items())
    effect = ", ".join(f"{name} {values[name]}" for name in other)
    return [
        f"{folder.name}/{GENERATION_CONFIG} says {said}; Microsoft's class never reads that file, and neither does the "
        "export: "
        f"{effect} of config.json is in effect"
    ]


def _sort(stated: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the bundle says, and what must be refused."""
    defaults = GenerationConfig().to_dict()
    known = GenerationOptions.__dataclass_fields__
    values = {name: stated.get(name) for name in GENERATION_DEFAULTS}
    values = {name: GENERATION_DEFAULTS[name] if value is None else value for name, value in values.items()}
    refused: dict[str, Any] = {}
    for name, value in stated.items():
        if name in values or name not in defaults or name.startswith("_") or value == defaults[name]:
            continue
        if name in known or name in _NOT_INHERITED:
            values[name] = value
        elif _is_obeyed(name, value, do_sample=bool(stated.get("do_sample"))):
            refused[name] = value
    return values, refused


def _is_obeyed(name: str, value: Any, *, do_sample: bool) -> bool:
    """Whether a setting that departs from the default changes the tokens of `generate`."""
    if name in _WITHOUT_EFFECT or value is None or value == _NEUTRAL.get(name):
        return False
    if name in SAMPLING_ONLY:
        return do_sample
    return not (isinstance(value, bool | int | float | list | dict | str) and not value)
