"""How a checkpoint generates: the defaults that its own `generate` would use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .json_files import read_json

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
"""What applies where a checkpoint says nothing: transformers' own defaults, and Florence-2's token ids."""

_GENERATION_EXTRAS: dict[str, Any] = {
    "max_new_tokens": None,
    "max_length": 20,
    "min_new_tokens": None,
    "min_length": 0,
    "do_sample": False,
    "repetition_penalty": 1.0,
}
"""transformers' defaults of settings that are exported only where a checkpoint differs from them."""


def read_generation(folder: Path, config: dict[str, Any], *, is_microsoft: bool) -> dict[str, Any]:
    """Reads the generation defaults that the checkpoint's own `generate` would use.

    In Microsoft's layout `generate` is that of the inner language model. It follows `text_config` and never reads
    generation_config.json, which in Microsoft's repositories says `early_stopping: false` where `true` is in effect. In
    the native layout it follows generation_config.json. What that file leaves out is taken from `text_config`, then
    from the top level of config.json, since transformers 5 writes configs without generation settings.

    Args:
        folder: The checkpoint.
        config: Its config.json.
        is_microsoft: Whether it is in Microsoft's layout.

    Returns:
        All keys of `GENERATION_DEFAULTS`, and those other settings that differ from transformers' defaults.
    """
    own = None if is_microsoft else read_json(folder, "generation_config.json")
    # The text configs of both layouts default to 2; only a generation_config.json can mean "not forced" by omission.
    implied = {"forced_eos_token_id": 2} if own is None else {}
    sources = [own or {}, config.get("text_config") or {}, {} if is_microsoft else config, implied]
    known = {key: _first(key, sources, default) for key, default in GENERATION_DEFAULTS.items()}
    extras = {key: _first(key, sources, default) for key, default in _GENERATION_EXTRAS.items()}
    return {**known, **{key: value for key, value in extras.items() if value != _GENERATION_EXTRAS[key]}}


def _first(key: str, sources: Iterable[dict[str, Any]], default: Any) -> Any:
    return next((source[key] for source in sources if source.get(key) is not None), default)
