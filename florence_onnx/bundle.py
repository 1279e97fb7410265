"""The model on disk: what a bundle consists of, and how a name is resolved to one.

A bundle is a directory with `florence_onnx.json`, three graphs, `tokenizer.json` and `generation_config.json`. The
directory layout of `onnx-community/Florence-2-*` (transformers.js) is read as well.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from florence_onnx.errors import (
    BundleError,
    BundleFileMissingError,
    BundleFormatError,
    BundleNotFoundError,
    CorruptGraphError,
)
from florence_onnx.options import GenerationDefaults, GenerationOptions

FORMAT_VERSION = 1
DESCRIPTION = "florence_onnx.json"
VISION_ENCODER = "vision_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
DECODER = "decoder.onnx"
GRAPHS = (VISION_ENCODER, TEXT_ENCODER, DECODER)
WEIGHTS = "weights.data"
"""The large tensors of all graphs, each stored once."""
TOKENIZER = "tokenizer.json"
GENERATION_CONFIG = "generation_config.json"
DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).parent / "demo" / "bundle"

JS_GRAPHS = ("vision_encoder", "embed_tokens", "encoder_model", "decoder_model_merged")
KEY_INPUTS: dict[str, tuple[str, ...]] = {
    VISION_ENCODER: ("pixel_values",),
    TEXT_ENCODER: ("input_ids", "attention_mask", "image_features"),
    DECODER: ("input_ids", "past_lengths", "encoder_attention_mask", "past_key_values.0.key"),
    "vision_encoder": ("pixel_values",),
    "embed_tokens": ("input_ids",),
    "encoder_model": ("attention_mask", "inputs_embeds"),
    "decoder_model_merged": ("inputs_embeds", "encoder_hidden_states", "use_cache_branch"),
}
"""Inputs that tell whether a file is the graph that its name says."""

JS_SUFFIXES = {
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_int8",
    "uint8": "_uint8",
    "q4": "_q4",
    "q4f16": "_q4f16",
    "bnb4": "_bnb4",
}
"""File name suffix of each precision in the layout of transformers.js."""

Layout = Literal["florence_onnx", "transformers.js"]
_log = logging.getLogger("florence_onnx")


@dataclass(frozen=True)
class ModelSizes:
    """Everything about the model that the runtime must know."""

    image_size: tuple[int, int]
    """`(width, height)` in pixels that the vision encoder takes."""
    image_mean: tuple[float, float, float]
    """Subtracted from channels scaled to 0..1."""
    image_std: tuple[float, float, float]
    """Divides the centred channels."""
    decoder_layers: int
    decoder_heads: int
    head_dim: int
    max_positions: int
    """Most tokens of the encoder (image and text) and of the decoder."""
    vocab_size: int
    """Rows of the language model head, padding rows included."""
    pad_token_id: int


@dataclass(frozen=True)
class Bundle:
    """A model directory, read and checked, no graph loaded."""

    path: Path
    layout: Layout
    precision: str
    sizes: ModelSizes
    generation: GenerationDefaults
    source: Mapping[str, Any] = field(default_factory=dict)
    """What it was exported from."""
    verification: Mapping[str, Any] = field(default_factory=dict)
    """What its export measured."""

    def graph(self, name: str) -> Path:
        """Path of a graph, named as in `GRAPHS` or `JS_GRAPHS`."""
        if self.layout == "florence_onnx":
            return self.path / name
        return self.path / "onnx" / f"{name}{JS_SUFFIXES[self.precision]}.onnx"

    @property
    def graphs(self) -> dict[str, Path]:
        """Names and paths of all graphs: first the vision encoder, then the text graphs."""
        return {name: self.graph(name) for name in (GRAPHS if self.layout == "florence_onnx" else JS_GRAPHS)}

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER


# ------------------------------------------------------------------------------------------------------------- reading


def read(path: Path, precision: str | None = None) -> Bundle:
    """Reads a bundle directory of either layout.

    Args:
        path: The directory.
        precision: Required precision; None takes what is there (fp32 in the transformers.js layout).

    Raises:
        BundleNotFoundError: It is not a bundle.
        BundleFileMissingError: A file is missing.
        BundleFormatError: The description is unreadable, of a newer format, or of another precision.
        CorruptGraphError: A file does not have its recorded size.
    """
    if (path / DESCRIPTION).is_file():
        return _read_own(path, precision)
    if (path / "onnx").is_dir() and (path / "config.json").is_file():
        return _read_transformers_js(path, precision or "fp32")
    raise BundleNotFoundError(
        f"{path} is not a bundle: it has neither {DESCRIPTION} nor onnx/. {_checkpoint_hint(path)}"
    )


def _checkpoint_hint(path: Path) -> str:
    if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return f"It looks like a PyTorch checkpoint; convert it with: florence-onnx-export {path} OUT"
    return "Export one with: florence-onnx-export CHECKPOINT OUT"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        BundleFileMissingError: There is no such file.
        BundleFormatError: It does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleFileMissingError(f"{path} is missing; export or download the bundle again") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleFormatError(f"{path} is not valid JSON ({error}); export or download the bundle again") from error
    if not isinstance(value, dict):
        raise BundleFormatError(f"{path} must hold a JSON object, it holds {type(value).__name__}")
    return value


def _read_own(path: Path, precision: str | None) -> Bundle:
    described = read_json(path / DESCRIPTION)
    version = described.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise BundleFormatError(
            f"{path / DESCRIPTION} has format version {version!r}, this florence_onnx reads up to {FORMAT_VERSION}; "
            "upgrade it with: pip install --upgrade florence-onnx"
        )
    _check_files(path, described.get("files", {}))
    try:
        values: dict[str, Any] = described["model"]
        model = ModelSizes(**{name: _untyped(value) for name, value in values.items()})
        found = str(described["precision"])
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleFormatError(f"{path / DESCRIPTION} is incomplete ({error}); export the bundle again") from error
    if precision not in (None, found):
        raise BundleFormatError(
            f"{path} has precision {found}, not {precision}; export it with --precision {precision}"
        )
    return Bundle(
        path,
        "florence_onnx",
        found,
        model,
        generation_defaults(read_json(path / GENERATION_CONFIG), model.max_positions, path),
        described.get("source", {}),
        described.get("verification", {}),
    )


def _untyped(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, facts in files.items():
        if not (path / name).is_file():
            raise BundleFileMissingError(f"{path / name} is missing; export or download the bundle again")
        size = (path / name).stat().st_size
        if size != facts.get("size", size):
            raise CorruptGraphError(
                f"{path / name} has {size} bytes instead of {facts['size']}; export or download the bundle again"
            )


_OPTION_NAMES = tuple(GenerationOptions.__dataclass_fields__)


def generation_defaults(config: Mapping[str, Any], max_positions: int, path: Path) -> GenerationDefaults:
    """The decoding defaults that a `generation_config.json` of a bundle in `path` states."""
    # max_new_tokens is not inherited: the checkpoints that carry one mean a sample, not a limit
    options = {
        name: config[name] for name in _OPTION_NAMES if config.get(name) is not None and name != "max_new_tokens"
    }
    start = config.get("decoder_start_token_id", 2)
    eos = config.get("eos_token_id", 2)
    if not isinstance(start, int) or not isinstance(eos, int):
        raise BundleFormatError(
            f"{path / GENERATION_CONFIG}: decoder_start_token_id and eos_token_id must be single ids"
        )
    return GenerationDefaults(start, eos, max_positions, GenerationOptions(**options))


def _read_transformers_js(path: Path, precision: str) -> Bundle:
    if precision not in JS_SUFFIXES:
        raise BundleFormatError(
            f"unknown precision {precision!r}; the layout of transformers.js has {', '.join(JS_SUFFIXES)}"
        )
    config = read_json(path / "config.json")
    text = config.get("text_config", {})
    images = read_json(path / "preprocessor_config.json")
    has_generation = (path / GENERATION_CONFIG).is_file()
    generation = read_json(path / GENERATION_CONFIG) if has_generation else {}
    try:
        model = ModelSizes(
            image_size=(int(images["size"]["width"]), int(images["size"]["height"])),
            image_mean=tuple(images["image_mean"]),
            image_std=tuple(images["image_std"]),
            decoder_layers=int(text["decoder_layers"]),
            decoder_heads=int(text["decoder_attention_heads"]),
            head_dim=int(text["d_model"]) // int(text["decoder_attention_heads"]),
            max_positions=int(text["max_position_embeddings"]),
            vocab_size=int(text.get("vocab_size", config.get("vocab_size", 0))),
            pad_token_id=int(text.get("pad_token_id", config.get("pad_token_id", 1))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleFormatError(f"{path}: config.json or preprocessor_config.json lacks {error}") from error
    # The text model's configuration is what the original `generate` reads; generation_config.json overrides it.
    merged = {**text, **{name: value for name, value in generation.items() if value is not None}}
    bundle = Bundle(path, "transformers.js", precision, model, generation_defaults(merged, model.max_positions, path))
    for graph in bundle.graphs.values():
        if not graph.is_file():
            raise BundleFileMissingError(f"{graph} is missing; this repository may lack precision {precision}")
    return bundle


# ------------------------------------------------------------------------------------------------------------- writing


def describe(
    *,
    precision: str,
    sizes: ModelSizes,
    source: Mapping[str, Any],
    verification: Mapping[str, Any],
    files: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `florence_onnx.json`, in the form that `read` takes."""
    return {
        "format_version": FORMAT_VERSION,
        "precision": precision,
        "model": asdict(sizes),
        "source": dict(source),
        "verification": dict(verification),
        "files": dict(files),
    }


# ----------------------------------------------------------------------------------------------------------- resolving

_HUB_FILES = (
    "*.json",
    *(f"{graph}*" for graph in GRAPHS),
    WEIGHTS,
)


def resolve(
    name: str | os.PathLike[str],
    *,
    precision: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Bundle:
    """Finds a bundle by name.

    Args:
        name: `"demo"` (the built-in model, even where a directory has that name), a directory, or a hub repository (`owner/name`).
        precision: See `read`.
        revision: Branch, tag or commit of a hub repository.
        cache_dir: Where downloads are kept, instead of the hub client's default.

    Raises:
        BundleNotFoundError: Nothing of that name exists, here or on the hub.
        BundleError: It exists and cannot be used; see `read`.
    """
    text = os.fspath(name)
    if text == DEMO:
        return read(DEMO_DIRECTORY, precision)
    path = Path(name)
    if text and path.is_dir():
        return read(path, precision)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")) or not all(text.split("/")):
        raise BundleNotFoundError(
            f'{text!r} is no directory; give a bundle directory, a hub repository "owner/name", or "demo"'
        )
    return _from_hub(text, precision, revision, cache_dir)


def _from_hub(
    repository: str, precision: str | None, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> Bundle:
    """Looks in the local cache first and goes online only for what is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    suffix = JS_SUFFIXES.get(precision or "fp32", "")
    patterns = [*_HUB_FILES, *(f"onnx/{graph}{suffix}.onnx*" for graph in JS_GRAPHS)]

    def fetch(**options: Any) -> Path:
        folder = snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=patterns,
            endpoint=os.environ.get("HF_ENDPOINT"),  # the client reads it once, when it is imported
            **options,
        )
        return Path(folder)

    try:
        return read(fetch(local_files_only=True), precision)
    except HFValidationError as error:
        raise BundleNotFoundError(f"{repository!r} is neither a directory nor a hub repository: {error}") from error
    except (LocalEntryNotFoundError, BundleError) as error:
        _log.info("%s is not complete in the local cache (%s); asking the hub", repository, error)
    return read(_download(repository, fetch), precision)


def _download(repository: str, fetch: Callable[[], Path]) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return fetch()
    except RepositoryNotFoundError as error:
        raise BundleNotFoundError(
            f"no hub repository {repository!r}; if it is private, log in with: hf auth login"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BundleNotFoundError(
            f"{repository!r} is not in the local cache and the hub could not be reached ({error}); "
            "download it on a machine with a network and pass its directory"
        ) from error
