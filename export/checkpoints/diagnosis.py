"""What is peculiar about a checkpoint, found in seconds, before the minutes of an export.

It reads a checkpoint with the same functions as `load_checkpoint`, one after the other, and goes on after a fault: the
table names all faults, where an export stops at the first.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import Florence2Config, GenerationConfig

from florence_onnx.errors import CheckpointError

from . import microsoft
from .adapters import ADAPTER_CONFIG, Adapter, find_adapter, is_unmerged, read_adapter, split_unmerged
from .checkpoint import Source, build_config, build_model, find_base, read_config, stated_ids, token_notes
from .folder import find_folder
from .generation import (
    GENERATION_CONFIG,
    GENERATION_DEFAULTS,
    SAMPLING_ONLY,
    TOKEN_IDS,
    GenerationSettings,
    read_settings,
)
from .json_files import read_json
from .preprocessing import Preprocessing, count_image_tokens, has_preprocessing, read_preprocessing
from .quantized import check_not_quantized
from .sizes import model_sizes
from .tokenizer import ADDED_TOKENS, has_tokenizer, load_tokenizer
from .weight_files import PICKLED, SAFETENSORS, has_weights, read_weights
from .weights import NATIVE, Weights, strip_prefixes

Verdict = Literal["ok", "note", "refused"]

MEMORY_FACTOR = 6.0
"""Memory of an export in fp32, as a multiple of the weights in fp32: 5.6 GB were measured for base (0.93 GB of weights)."""
DISK_FACTOR = 1.7
"""Disk that an export in fp32 needs while it writes: each graph with its own weights, then the shared ones. Measured for
base: 1.46 GB."""


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Example: `Finding("weights", "120 tensors of float16, 0.46 GB", "ok")`
    """

    topic: str
    text: str
    verdict: Verdict = "ok"


class Diagnosis:
    """All findings about one checkpoint, in the order in which they were made."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    @property
    def can_be_exported(self) -> bool:
        """Whether nothing was refused."""
        return all(finding.verdict != "refused" for finding in self.findings)

    def add(self, topic: str, text: str, verdict: Verdict = "ok") -> None:
        """Adds a row."""
        self.findings.append(Finding(topic, text, verdict))

    @contextmanager
    def attempt(self, topic: str) -> Iterator[None]:
        """Makes a refusal of the enclosed block a row."""
        try:
            yield
        except CheckpointError as error:
            self.add(topic, str(error), "refused")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"can_be_exported": self.can_be_exported, "findings": [dict(vars(each)) for each in self.findings]}


def diagnose(
    source: Source,
    *,
    revision: str | None = None,
    processor: Source | None = None,
    adapter: Source | None = None,
    base: Source | None = None,
    output: Path = Path(),
) -> Diagnosis:
    """Examines a checkpoint; arguments as for `load_checkpoint`.

    Args:
        source: A folder or a hub id.
        revision: Branch, tag or commit of a hub id.
        processor: Where the tokenizer and the preprocessing are.
        adapter: An adapter to merge into it.
        base: The base model, where `source` is an adapter.
        output: A directory on the disk that an export would be written to.
    """
    found = Diagnosis()
    with found.attempt("checkpoint"):
        folder = find_folder(source, revision)
        applied = _examine_adapter(found, folder, adapter)
        base_folder = find_base(applied, base) if applied is not None and adapter is None else folder
        places = [] if applied is None else [applied.folder]
        if processor is not None:
            places = [find_folder(processor, None, with_weights=False)]
        _examine_folder(found, base_folder, places, output)
    return found


def _examine_adapter(found: Diagnosis, folder: Path, adapter: Source | None) -> Adapter | None:
    if adapter is None and not find_adapter(folder):
        return None
    applied = read_adapter(find_folder(adapter, None) if adapter is not None else folder)
    _add_adapter(found, applied)
    return applied


def _add_adapter(found: Diagnosis, applied: Adapter) -> None:
    config = applied.config
    shown = ("r", "lora_alpha", "target_modules", "modules_to_save", "use_dora", "use_rslora", "rank_pattern")
    said = ", ".join(f"{name} {config[name]}" for name in shown if config.get(name))
    names = "Microsoft's" if applied.is_microsoft else "transformers'"
    found.add("adapter", f"{applied.kind}, {len(applied.weights)} tensors, trained on {names} class: {said}", "note")
    if find_spec("peft") is None:
        found.add("adapter", "PEFT merges it and is not installed: pip install 'florence-onnx[export,peft]'", "refused")


def _examine_folder(found: Diagnosis, folder: Path, places: list[Path], output: Path) -> None:
    config_json = read_config(folder)
    is_microsoft = microsoft.is_microsoft(config_json)
    version = config_json.get("transformers_version", "unknown")
    layout = "Microsoft's, with remote code that is never run" if is_microsoft else "transformers' native one"
    found.add("layout", f"{layout}; saved by transformers {version}; {folder}")
    config = build_config(config_json, is_microsoft)
    found.add("sizes", _describe_sizes(config))
    preprocessing = settings = None
    with found.attempt("images"):
        preprocessing = read_preprocessing(_first(has_preprocessing, places, folder))
        found.add("images", _describe_images(config, preprocessing, is_microsoft=is_microsoft))
    with found.attempt("generation"):
        settings = read_settings(folder, config, config_json, is_microsoft=is_microsoft)
        _add_settings(found, folder, settings, is_microsoft=is_microsoft)
        if preprocessing is not None:
            settings.check(folder, model_sizes(config, preprocessing))
    with found.attempt("tokenizer"):
        if settings is not None:
            place = _first(has_tokenizer, places, folder)
            tokenizer = load_tokenizer(place, config.text_config.vocab_size, stated_ids(config, settings))
            found.add("tokenizer", _describe_tokenizer(tokenizer, config.text_config.vocab_size))
            for note in token_notes(folder, settings, tokenizer):
                found.add("tokenizer", note, "note")
    with found.attempt("weights"):
        _examine_weights(found, folder, config_json, config, output)


def _first(has: Callable[[Path], bool], places: list[Path], folder: Path) -> Path:
    return next((place for place in (*places, folder) if has(place)), folder)


def _describe_sizes(config: Florence2Config) -> str:
    vision, text = config.vision_config, config.text_config
    return (
        f"vision {'-'.join(map(str, vision.embed_dim))} wide, {'-'.join(map(str, vision.depths))} deep, window "
        f"{vision.window_size}; "
        f"text {text.d_model} wide, {text.encoder_layers} + {text.decoder_layers} layers, "
        f"{text.max_position_embeddings} positions, vocabulary {text.vocab_size}"
    )


def _describe_images(config: Florence2Config, preprocessing: Preprocessing, *, is_microsoft: bool) -> str:
    width, height = preprocessing.image_size
    step = math.prod(config.vision_config.patch_stride)
    largest = max(size for size in range(step, step * 200, step) if _fits(config, size))
    shapes = "squares" if is_microsoft else "squares and rectangles"
    return (
        f"{width} x {height} pixels, {count_image_tokens(config, preprocessing.image_size)} image tokens; the "
        "checkpoint's own class "
        f"takes {shapes} of {step} to {largest} pixels"
    )


def _fits(config: Florence2Config, side: int) -> bool:
    """Whether there are positions for a square of so many cells, and for its tokens with a start and an end token."""
    try:
        return count_image_tokens(config, (side, side)) + 2 <= config.text_config.max_position_embeddings
    except CheckpointError:
        return False


def _add_settings(found: Diagnosis, folder: Path, settings: GenerationSettings, *, is_microsoft: bool) -> None:
    values = settings.values
    found.add("tokens", ", ".join(f"{name} {values[name]}" for name in TOKEN_IDS))
    chosen = [name for name in values if name not in TOKEN_IDS and values[name] != GENERATION_DEFAULTS.get(name)]
    said = ", ".join(f"{name} {values[name]}" for name in chosen) or "transformers' defaults: greedy, nothing forced"
    found.add("generation", f"of {settings.file}: {said}")
    if settings.refused:
        said = ", ".join(f"{name} {value}" for name, value in settings.refused.items())
        found.add("generation", f"obeyed by generate, unknown to the runtime: {said}", "refused")
    for note in settings.notes:
        found.add("generation", note, "note")
    own = read_json(folder, GENERATION_CONFIG) or {}
    known = GenerationConfig().to_dict().keys() - {"transformers_version", "_from_model_config"}
    ignored = [
        name for name in own if name in known and own[name] is not None and name not in values | settings.refused
    ]
    if is_microsoft:
        effective = settings.effective.to_dict()
        ignored = [name for name in own if name in known and own[name] not in (None, effective.get(name))]
    if ignored:
        why = "Microsoft's class never reads it" if is_microsoft else "they change no token"
        only = " (without do_sample)" if SAMPLING_ONLY & set(ignored) and not is_microsoft else ""
        said = ", ".join(f"{name} {own[name]}" for name in ignored)
        found.add("generation", f"in {GENERATION_CONFIG} to no effect: {said}; {why}{only}", "note")


def _describe_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> str:
    size = tokenizer.get_vocab_size()
    last = tokenizer.token_to_id(ADDED_TOKENS[-1])
    extra = sorted(token for token, index in tokenizer.get_vocab().items() if index > last and token != "<image>")
    said = f"; of the fine-tune: {', '.join(extra[:10])}{' …' if len(extra) > 10 else ''}" if extra else ""
    return f"{size} entries for {vocab_size} rows, <od> at {tokenizer.token_to_id('<od>')}{said}"


def _examine_weights(
    found: Diagnosis, folder: Path, config_json: dict[str, Any], config: Florence2Config, output: Path
) -> None:
    raw = read_weights(folder)
    stored, prefixes = strip_prefixes(raw)
    found.add("weights", _describe_weights(folder, stored))
    if prefixes:
        found.add("weights", f"all stored under the prefix {''.join(prefixes)}, which is left out", "note")
    check_not_quantized(folder, config_json, stored)
    if is_unmerged(stored):
        stored, adapter = split_unmerged(folder, stored)
        _add_adapter(found, adapter)
    elif (folder / ADAPTER_CONFIG).is_file() and not find_adapter(folder):
        found.add(
            "adapter", f"{ADAPTER_CONFIG} lies beside whole weights without adapter weights: taken as merged", "note"
        )
    layout = microsoft.LAYOUT if microsoft.is_microsoft(config_json) else NATIVE
    model = build_model(config, stored, layout)
    is_tied = model.lm_head.weight is model.model.language_model.shared.weight
    found.add(
        "head",
        "tied to the token embedding" if is_tied else "separate from the token embedding",
        "ok" if is_tied else "note",
    )
    num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    _add_needs(found, num_bytes, output)


def _describe_weights(folder: Path, stored: Weights) -> str:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in stored.values())
    kinds = ", ".join(f"{count} of {dtype}" for dtype, count in dtypes.most_common())
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    name = SAFETENSORS if has_weights(folder, SAFETENSORS) else PICKLED
    shards = "" if (folder / name).is_file() else ", in shards"
    return f"{name}{shards}: {len(stored)} tensors ({kinds}), {num_bytes / 1e9:.2f} GB"


def _add_needs(found: Diagnosis, num_bytes: int, output: Path) -> None:
    disk, memory = DISK_FACTOR * num_bytes, MEMORY_FACTOR * num_bytes
    free = shutil.disk_usage(
        next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    ).free
    available = _available_memory()
    said = f"{num_bytes / 4e6:.1f} million weights: about {disk / 1e9:.1f} GB of disk ({free / 1e9:.1f} free)"
    said += f", {memory / 1e9:.1f} GB of memory" + ("" if available is None else f" ({available / 1e9:.1f} available)")
    is_enough = disk < free and (available is None or memory < available)
    found.add("an export needs", said, "ok" if is_enough else "note")


def _available_memory() -> int | None:
    """Bytes, where Linux tells."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
