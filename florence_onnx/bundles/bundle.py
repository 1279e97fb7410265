"""The model on disk: what a bundle consists of, and how it is read, checked and described.

A bundle is a directory with `florence_onnx.json`, the graphs (vision encoder, text encoder, decoder, and the decoder
that selects the top-k for accelerators), `weights.data`, `tokenizer.json`, `generation_config.json`, and `tasks.json`
where it carries tasks of its own. The layout of `onnx-community/Florence-2-*` (transformers.js) is read as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from florence_onnx.bundles import description, own_tasks, precisions
from florence_onnx.bundles.json_files import read_json
from florence_onnx.bundles.precisions import JS_GRAPHS, Precision
from florence_onnx.errors import (
    BundleError,
    BundleFileMissingError,
    BundleFormatError,
    BundleNotFoundError,
    CorruptGraphError,
    InputError,
    OptionsError,
)
from florence_onnx.generation import option_values as values
from florence_onnx.generation.option_names import check_refused, parse_options
from florence_onnx.generation.options import OPTION_NAMES, GenerationDefaults, GenerationOptions, merge
from florence_onnx.tasks import Task

FORMAT_VERSION = 3
"""Version 3: every token has its own slot of the self KV cache, and there is a decoder that selects the top-k."""
DESCRIPTION = "florence_onnx.json"
VISION_ENCODER = "vision_encoder.onnx"
"""The vision encoder of the default image size; for those of others see `vision_encoder_name`."""
TEXT_ENCODER = "text_encoder.onnx"
DECODER = "decoder.onnx"
DECODER_TOP = "decoder_top.onnx"
"""The decoder with the top-k logits as further outputs (`TOP_VALUES`, `TOP_IDS`, `LOG_SUMS`), which accelerators run
instead of `DECODER`."""
GRAPHS = (VISION_ENCODER, TEXT_ENCODER, DECODER, DECODER_TOP)
TOP_VALUES = "top_values"
TOP_IDS = "top_ids"
LOG_SUMS = "log_sums"
WEIGHTS = "weights.data"
"""The large tensors of all graphs; those that graphs share are stored once."""
TOKENIZER = "tokenizer.json"
GENERATION_CONFIG = "generation_config.json"
CONFIGURED = "generation_options.json"
"""Generation options of the bundle's owner, over the checkpoint's; absent where there are none. A file of its own, whose hash is
recorded nowhere: it is changed in place (`florence_onnx.bundles.configuration`), and no engine is built anew for it."""
DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).parents[1] / "demo" / "bundle"

MAX_HASHED_BYTES = 32 * 2**20
"""Largest file whose hash is checked at every load. Hashing gigabytes would slow down every start; of larger files
only the size is checked."""
JS_VERIFICATION = "verification.json"
"""Where an export in the layout of transformers.js, which has no file of its own for that, records its verification."""

_DECODER_INPUTS = ("input_ids", "positions", "slots", "visible", "encoder_attention_mask", "past_key_values.0.key")
KEY_INPUTS: dict[str, tuple[str, ...]] = {
    VISION_ENCODER: ("pixel_values",),
    TEXT_ENCODER: ("input_ids", "attention_mask", "image_features"),
    DECODER: _DECODER_INPUTS,
    DECODER_TOP: _DECODER_INPUTS,
    "vision_encoder": ("pixel_values",),
    "embed_tokens": ("input_ids",),
    "encoder_model": ("attention_mask", "inputs_embeds"),
    "decoder_model_merged": ("inputs_embeds", "encoder_hidden_states", "use_cache_branch"),
}
"""Inputs that a file must have to be the graph that its name says."""

PREFERRED_PRECISIONS = ("int8", "fp32", "fp16", "int4")
"""Which bundle of several to read on a CPU, first choice first. int8 is the fastest that answers as well as fp32."""

Layout = Literal["florence_onnx", "transformers.js"]

ImageSize: TypeAlias = int | tuple[int, int]
"""An image size as callers give it: `(width, height)` in pixels, or the side of a square."""


def vision_encoder_name(image_size: tuple[int, int]) -> str:
    """File name of the vision encoder for a further image size `(width, height)` of a bundle."""
    return f"{Path(VISION_ENCODER).stem}_{size_name(image_size)}.onnx"


def is_vision_encoder(graph: str) -> bool:
    """Whether a graph's file name is that of a vision encoder, for whatever image size."""
    return graph == VISION_ENCODER or graph.startswith(f"{Path(VISION_ENCODER).stem}_")


def size_name(image_size: tuple[int, int]) -> str:
    """`(width, height)` as people write it: `384x384`."""
    return f"{image_size[0]}x{image_size[1]}"


def as_image_size(image_size: ImageSize) -> tuple[int, int]:
    """`(width, height)` of an image size.

    Raises:
        InputError: It is neither a positive whole number nor two of them.
    """
    sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    is_valid = len(sides) == 2 and all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not is_valid or min(sides) < 1:
        raise InputError(f"image_size must be a number of pixels or (width, height), such as 384; got {image_size!r}")
    return sides[0], sides[1]


def parse_image_size(text: str) -> tuple[int, int]:
    """`(width, height)` of an image size as the command lines take it: `384`, or `512x384`.

    Raises:
        InputError: It is neither.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError(f"an image size is a number of pixels or WIDTHxHEIGHT, such as 384 or 512x384; got {text!r}")
    return as_image_size((int(sides[0]), int(sides[-1])))


@dataclass(frozen=True)
class ModelSizes:
    """The sizes and constants of a model that the runtime needs."""

    image_size: tuple[int, int]
    """Input size of the vision encoder, `(width, height)` in pixels."""
    image_mean: tuple[float, float, float]
    """Mean of red, green and blue, on the scale 0 to 1; see `images.preprocessing`."""
    image_std: tuple[float, float, float]
    """Standard deviation of red, green and blue, on the scale 0 to 1."""
    decoder_layers: int
    decoder_heads: int
    head_dim: int
    max_positions: int
    """Most tokens of the encoder (image and text together) and of the decoder."""
    vocab_size: int
    """V, the rows of the language model head, padding rows included."""
    num_image_tokens: int
    """N, the rows of `image_features` per image."""
    pad_token_id: int

    @property
    def width(self) -> int:
        """D, the columns of `image_features`."""
        return self.decoder_heads * self.head_dim

    def __post_init__(self) -> None:
        """Raises BundleFormatError for values out of range, which would fail later with an obscure error."""
        for name, value in vars(self).items():
            description.check_size(name, value)
        description.check_sizes_together(vars(self))


@dataclass(frozen=True)
class SizedEncoder:
    """One of several vision encoders of a bundle: an entry of `image_sizes` in its description."""

    image_size: tuple[int, int]
    """`(width, height)` in pixels."""
    num_image_tokens: int
    """N, the rows of its `image_features` per image."""
    graph: str
    """Its file name."""
    memory: Mapping[str, Any] = field(default_factory=dict)
    """As `Bundle.memory`, for images of this size."""


@dataclass(frozen=True)
class Bundle:
    """A model directory that was read and checked; no graph is loaded."""

    path: Path
    layout: Layout
    precision: str
    """In the layout of transformers.js, where modules differ, those of all modules: see `precisions.describe`."""
    sizes: ModelSizes
    generation: GenerationDefaults
    """Of the checkpoint's generation_config.json, with the options that `florence-onnx configure` has written over them."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Name, revision, layout and dtype of the checkpoint that it was exported from."""
    verification: Mapping[str, Any] = field(default_factory=dict)
    """The differences from the checkpoint that its export measured."""
    vision_precision: str | None = None
    """Precision of the vision encoder, where it differs from `precision`."""
    memory: Mapping[str, Any] = field(default_factory=dict)
    """Device memory of its graphs, for `florence_onnx.bundles.memory`; empty where it is not known."""
    checkpoint_generation: GenerationDefaults | None = None
    """What the checkpoint's own generation_config.json alone says."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Precision of each graph in `JS_GRAPHS`; empty in the other layout."""
    tasks: Mapping[str, Task[Any]] = field(default_factory=dict)
    """Tasks that the bundle carries beside Florence-2's, by slug; see `bundles.own_tasks`."""
    encoders: tuple[SizedEncoder, ...] = ()
    """The vision encoders of a bundle for several image sizes, the default first; empty where there is one size."""
    vision_encoder: str = VISION_ENCODER
    """File name of the vision encoder for `sizes.image_size`."""
    digest: str | None = None
    """SHA-256, in hexadecimal, of the hashes of its graphs and weights; None where they are not stated."""

    def has_precision(self, wanted: Precision | None) -> bool:
        """Whether it has a precision, or all of those that are asked for by module; InputError as for `precisions.parse`."""
        asked = precisions.parse(wanted)
        if isinstance(asked, dict):
            return all(self._precision_of(module) == value for module, value in asked.items())
        return asked in (None, self.precision)

    def _precision_of(self, module: str) -> str:
        if self.modules:
            return self.modules[module]
        return self.vision_precision or self.precision if module == precisions.VISION else self.precision

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes `(width, height)` in pixels at which the model can read images."""
        return tuple(each.image_size for each in self.encoders) or (self.sizes.image_size,)

    @property
    def all_num_image_tokens(self) -> tuple[int, ...]:
        """Image tokens N at each of `image_sizes`, without repetitions."""
        counts = [each.num_image_tokens for each in self.encoders] or [self.sizes.num_image_tokens]
        return tuple(dict.fromkeys(counts))

    def resized(self, image_size: ImageSize) -> Bundle:
        """The same bundle with another default image size: its sizes, vision encoder and memory are those of that size.

        Args:
            image_size: One of `image_sizes`; a number is the side of a square.

        Raises:
            InputError: The bundle has no vision encoder for that size; the message names those that there are.
        """
        wanted = as_image_size(image_size)
        if wanted == self.sizes.image_size:
            return self
        found = next((each for each in self.encoders if each.image_size == wanted), None)
        if found is None:
            known = ", ".join(map(size_name, self.image_sizes))
            raise InputError(
                f"this model reads images of {known} pixels, not {size_name(wanted)}: choose one of these, or export it "
                f"again with --image-size {size_name(wanted)} as well"
            )
        sizes = replace(self.sizes, image_size=wanted, num_image_tokens=found.num_image_tokens)
        return replace(self, sizes=sizes, vision_encoder=found.graph, memory=found.memory)

    def graph(self, name: str) -> Path:
        """Path of a graph, named as in `GRAPHS` or `JS_GRAPHS`; `VISION_ENCODER` is that for `sizes.image_size`."""
        if self.layout == "florence_onnx":
            return self.path / (self.vision_encoder if name == VISION_ENCODER else name)
        return self.path / precisions.js_file(name, self.modules[name])

    @property
    def graphs(self) -> dict[str, Path]:
        """Paths of all graphs by name: the vision encoder, then the text graphs."""
        return {name: self.graph(name) for name in (GRAPHS if self.layout == "florence_onnx" else JS_GRAPHS)}

    def stages(self, *, is_resident: bool = False) -> dict[str, Path]:
        """Paths of the graphs that one model loads, by name, in the order of `graphs`.

        Args:
            is_resident: Whether features and KV caches stay in device memory, for which the decoder selects the top-k.
        """
        if self.layout != "florence_onnx":
            return self.graphs
        skipped = DECODER if is_resident else DECODER_TOP
        return {name: path for name, path in self.graphs.items() if name != skipped}

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER


# ------------------------------------------------------------------------------------------------------------- reading


def read(path: Path, precision: Precision | None = None, *, preferred: Sequence[str] = PREFERRED_PRECISIONS) -> Bundle:
    """Reads a bundle of either layout, or one of several bundles in subdirectories named after their precision.

    Args:
        path: The directory.
        precision: Required precision, or precisions by module. None accepts any. In the layout of transformers.js it means
            fp32, also for modules that are not named.
        preferred: Which of several bundles to read if `precision` is None, first choice first.

    Raises:
        BundleNotFoundError: The directory is not a bundle and contains none.
        BundleFileMissingError: A file is missing.
        BundleFormatError: The description is unreadable, or has another format version or precision.
        InputError: `precision` is malformed.
        CorruptGraphError: A file does not have its recorded size or, up to `MAX_HASHED_BYTES`, its recorded hash.
    """
    if (path / DESCRIPTION).is_file():
        return _read_own(path, precision)
    if (path / "onnx").is_dir() and (path / "config.json").is_file():
        return _read_transformers_js(path, precision)
    chosen = choose(path, precision, preferred)
    if chosen is not None:
        asked = precisions.parse(precision)
        return _read_own(path / chosen, asked if isinstance(asked, dict) else chosen)
    raise BundleNotFoundError(
        f"{path} is not a bundle: it has neither {DESCRIPTION} nor onnx/. {_checkpoint_hint(path)}"
    )


def choose(path: Path, precision: Precision | None, preferred: Sequence[str] = PREFERRED_PRECISIONS) -> str | None:
    """Chooses one of several bundles in subdirectories named after their precision.

    Args:
        path: The directory.
        precision: Required precision, or None. Of precisions by module that of the decoder counts, and if it has none, that
            of another module which is not the vision encoder.
        preferred: Order of choice if `precision` is None, or names the vision encoder only.

    Returns:
        The precision, which is the name of the subdirectory; None if `path` contains no bundles.

    Raises:
        BundleFormatError: There are bundles, but none of the required precision.
    """
    found = sorted({entry.parent.name for entry in path.glob(f"*/{DESCRIPTION}")} & set(PREFERRED_PRECISIONS))
    if not found:
        return None
    asked = precisions.parse(precision)
    # JS_GRAPHS has the decoder last, and an export the same precision for all but the vision encoder
    text = (
        [value for module, value in asked.items() if module != precisions.VISION]
        if isinstance(asked, dict)
        else [asked]
    )
    wanted = text[-1] if text else None
    if wanted is not None and wanted not in found:
        raise BundleFormatError(
            f"{path} has precisions {', '.join(found)}, not {wanted}; export it with --precision {wanted}"
        )
    return wanted or next((name for name in preferred if name in found), found[0])


def _checkpoint_hint(path: Path) -> str:
    if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")) or (path / "config.json").is_file():
        return f"It looks like a PyTorch checkpoint; convert it with: florence-onnx-export {path} OUT"
    return "Export one with: florence-onnx-export CHECKPOINT OUT"


def _read_own(path: Path, precision: Precision | None) -> Bundle:
    described = read_json(path / DESCRIPTION)
    _check_version(path, described.get("format_version"))
    try:
        _check_description(described)
        check_files(path, described.get("files", {}), max_hashed_bytes=MAX_HASHED_BYTES)
        stated: dict[str, Any] = described["model"]
        model = ModelSizes(**{name: _as_tuple(value) for name, value in stated.items()})
        found: str = described["precision"]
        encoders = _read_encoders(described.get("image_sizes"), model)
    except (KeyError, TypeError, AttributeError, BundleFormatError) as error:
        raise BundleFormatError(
            f"{path / DESCRIPTION} is incomplete or damaged ({error}); export the bundle again"
        ) from error
    own = generation_defaults(read_json(path / GENERATION_CONFIG), model, path)
    bundle = Bundle(
        path,
        "florence_onnx",
        found,
        model,
        configured(own, path),
        described.get("source", {}),
        described.get("verification", {}),
        described.get("vision_precision"),
        described.get("memory") or {},
        own,
        tasks=own_tasks.read(path),
        encoders=encoders,
        digest=_digest(described.get("files", {})),
    )
    _check_precision(bundle, precision)
    return bundle


def _check_precision(bundle: Bundle, precision: Precision | None) -> None:
    if bundle.has_precision(precision):
        return
    if isinstance(precisions.parse(precision), str):
        raise BundleFormatError(
            f"{bundle.path} has precision {bundle.precision}, not {precision}; export it with --precision {precision}"
        )
    raise BundleFormatError(
        f"{bundle.path} has precision {bundle.precision}, its vision encoder {bundle.vision_precision or bundle.precision}; not "
        f"{precision}. In florence_onnx's own layout only the vision encoder can have another precision than the rest: "
        "export it with --precision and --vision-precision"
    )


def _check_description(described: Mapping[str, Any]) -> None:
    """Checks all but the sizes of the model, which `ModelSizes` checks, and the files.

    Raises:
        BundleFormatError: It is not what was written, or a value is out of its range.
        KeyError: It has no precision.
    """
    description.check_digest(described)
    description.check_name("precision", described["precision"], PREFERRED_PRECISIONS)
    if described.get("vision_precision") is not None:
        description.check_name("vision_precision", described["vision_precision"], PREFERRED_PRECISIONS)
    for name in ("source", "verification"):
        description.as_object(name, described.get(name, {}))
    description.check_memory(described.get("memory"))


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Of the files that hold the model; settings and the tokenizer may be changed without changing what it computes."""
    stated = sorted((name, facts["sha256"]) for name, facts in files.items() if name.endswith((".onnx", ".data")))
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest() if stated else None


def _read_encoders(entries: object, sizes: ModelSizes) -> tuple[SizedEncoder, ...]:
    """Reads `image_sizes` of a description, which a bundle of one size does not have.

    Raises:
        BundleFormatError: An entry is damaged, or they contradict each other or the model's sizes.
    """
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise BundleFormatError(f"image_sizes must be a list, got {description.shown(entries)}")
    found = tuple(_read_encoder(description.check_encoder(entry), sizes) for entry in entries)
    known = [each.image_size for each in found]
    if len(set(known)) < len(known):
        raise BundleFormatError(f"image_sizes has a size twice: {', '.join(map(size_name, known))}")
    default = SizedEncoder(sizes.image_size, sizes.num_image_tokens, VISION_ENCODER)
    if not found or replace(found[0], memory={}) != default:
        raise BundleFormatError(
            f"image_sizes must begin with {size_name(default.image_size)}, {default.num_image_tokens} image tokens and "
            f"{VISION_ENCODER}, as model says"
        )
    return found


def _read_encoder(stated: Mapping[str, Any], sizes: ModelSizes) -> SizedEncoder:
    image_size, count, graph = _as_tuple(stated["image_size"]), stated["num_image_tokens"], stated["graph"]
    replace(sizes, image_size=image_size, num_image_tokens=count)  # which checks them together
    if not is_vision_encoder(graph):
        raise BundleFormatError(f"{description.shown(graph)} cannot be the name of a vision encoder")
    return SizedEncoder(image_size, count, graph, stated.get("memory") or {})


def _check_version(path: Path, version: object) -> None:
    if version == FORMAT_VERSION and not isinstance(version, bool):
        return
    found = f"{path / DESCRIPTION} has format version {version!r}, this florence_onnx reads {FORMAT_VERSION}; "
    if isinstance(version, int) and 1 <= version < FORMAT_VERSION:
        raise BundleFormatError(f"{found}export it again: florence-onnx-export CHECKPOINT OUT")
    raise BundleFormatError(f"{found}upgrade it with: pip install --upgrade florence-onnx")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_files(path: Path, files: Mapping[str, Mapping[str, Any]], *, max_hashed_bytes: int | None = None) -> None:
    """Checks the files of a bundle against the sizes and hashes recorded when they were written.

    Args:
        path: The bundle's directory.
        files: `size` in bytes and `sha256` of each file, by name.
        max_hashed_bytes: Of larger files only the size is checked; None checks the hash of all.

    Raises:
        BundleFileMissingError: A file is missing.
        CorruptGraphError: A file has another size or hash.
    """
    for name, facts in files.items():
        description.check_file(name, facts)
        if not (path / name).is_file():
            raise BundleFileMissingError(f"{path / name} is missing; export or download the bundle again")
        size = (path / name).stat().st_size
        if size != facts["size"]:
            raise CorruptGraphError(
                f"{path / name} has {size} bytes instead of {facts['size']}; export or download the bundle again"
            )
        is_hashed = max_hashed_bytes is None or size <= max_hashed_bytes
        if is_hashed and sha256(path / name) != facts["sha256"]:
            raise CorruptGraphError(
                f"{path / name} is damaged: its content is not what was written; export or download the bundle again"
            )


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; raises BundleError where it cannot be read."""
    digest = hashlib.sha256()  # hashlib.file_digest is too new for Python 3.10
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def generation_defaults(config: Mapping[str, Any], sizes: ModelSizes, path: Path) -> GenerationDefaults:
    """Reads generation defaults from a `generation_config.json`.

    Every setting that transformers' `generate` obeys is obeyed or refused. Names that `generate` does not know are ignored, as
    there.

    Args:
        config: Content of the file.
        sizes: Sizes of the model, which limit the options.
        path: The bundle's directory, for error messages.

    Raises:
        BundleFormatError: An option is invalid, or is not implemented.
    """
    # max_new_tokens is not inherited: where a checkpoint has one, it belongs to a code sample and would cut answers off
    skipped = ("max_new_tokens", "eos_token_id")
    options = {name: config[name] for name in OPTION_NAMES if config.get(name) is not None and name not in skipped}
    try:
        check_refused(config)
        own = GenerationOptions(**{**options, **{name: _single(options[name]) for name in _FORCED & options.keys()}})
        defaults = GenerationDefaults(
            values.whole(
                "decoder_start_token_id", _single(config.get("decoder_start_token_id", 2)), 0, sizes.vocab_size - 1
            ),
            values.one_or_several_tokens("eos_token_id", config.get("eos_token_id", 2), sizes.vocab_size),
            sizes.max_positions,
            sizes.vocab_size,
            own,
        )
        defaults.resolve(None)
    except OptionsError as error:
        raise BundleFormatError(f"{path / GENERATION_CONFIG}: {error}") from error
    return defaults


def configured(defaults: GenerationDefaults, path: Path) -> GenerationDefaults:
    """The checkpoint's defaults with those of `CONFIGURED` over them.

    Args:
        defaults: Of generation_config.json.
        path: The bundle's directory.

    Raises:
        BundleFormatError: The file is damaged, or its options are not possible.
    """
    if not (path / CONFIGURED).is_file():
        return defaults
    return configured_with(defaults, read_json(path / CONFIGURED), path)


def configured_with(defaults: GenerationDefaults, options: Mapping[str, Any], path: Path) -> GenerationDefaults:
    """The same for options that may not be in the file yet: by name, as JSON has them."""
    try:
        found = replace(defaults, options=merge(defaults.options, parse_options(options)))
        found.resolve(None)
    except OptionsError as error:
        raise BundleFormatError(f"{path / CONFIGURED}: {error}") from error
    return found


_FORCED = {"forced_bos_token_id", "forced_eos_token_id"}


def _single(value: Any) -> Any:
    """Unpacks a list with one token id, which transformers accepts wherever it takes an id."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _read_transformers_js(path: Path, precision: Precision | None) -> Bundle:
    modules = precisions.js_modules(precision)
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
            num_image_tokens=_count_image_tokens(config, int(images["size"]["width"])),
            pad_token_id=int(text.get("pad_token_id", config.get("pad_token_id", 1))),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, BundleFormatError) as error:
        raise BundleFormatError(
            f"{path}: config.json or preprocessor_config.json is incomplete or damaged: {type(error).__name__} {error}"
        ) from error
    measured = read_json(path / JS_VERIFICATION) if (path / JS_VERIFICATION).is_file() else {}
    own = generation_defaults(_merge_generation(config, generation), model, path)
    precisions.check_present(
        modules, (f"onnx/{file.name}" for file in (path / "onnx").iterdir() if file.is_file()), str(path)
    )
    described = precisions.describe(modules)
    return Bundle(
        path,
        "transformers.js",
        described,
        model,
        configured(own, path),
        measured.get("source", {}),
        measured.get("verification", {}),
        None if described == modules[precisions.VISION] else modules[precisions.VISION],
        checkpoint_generation=own,
        modules=modules,
        tasks=own_tasks.read(path),
    )


def _merge_generation(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the generation options of a checkpoint as its original code does.

    Microsoft's code follows `text_config` and takes from generation_config.json, which contradicts it, only what is
    missing there. transformers follows generation_config.json and takes from `text_config` what is missing. Both force
    the end token at the limit.

    Args:
        config: Content of config.json; a vision config with `dim_embed` is Microsoft's.
        generation: Content of generation_config.json.
    """
    text = {name: value for name, value in config.get("text_config", {}).items() if value is not None}
    own = {name: value for name, value in generation.items() if value is not None}
    is_microsoft = "dim_embed" in config.get("vision_config", {})
    merged = {**own, **text} if is_microsoft else {**text, **own}
    is_stated = "forced_eos_token_id" in generation
    end = merged.get("eos_token_id", 2)
    return merged if is_stated else {"forced_eos_token_id": end[0] if isinstance(end, list) and end else end, **merged}


def _count_image_tokens(config: Mapping[str, Any], side: int) -> int:
    """The cells of the last stage's grid, and one token for the mean of them."""
    strides = config["vision_config"].get("patch_stride", (4, 2, 2, 2))
    return int((side // math.prod(strides)) ** 2 + 1)


# ------------------------------------------------------------------------------------------------------------- writing


def describe(
    *,
    precision: str,
    vision_precision: str | None = None,
    sizes: ModelSizes,
    source: Mapping[str, Any],
    verification: Mapping[str, Any],
    memory: Mapping[str, Any] | None,
    files: Mapping[str, Any],
    encoders: Sequence[SizedEncoder] = (),
) -> dict[str, Any]:
    """The content of `florence_onnx.json`, as `read` expects it."""
    several = {"image_sizes": [asdict(each) for each in encoders]} if encoders else {}
    return {
        "format_version": FORMAT_VERSION,
        "precision": precision,
        "vision_precision": vision_precision,
        "model": asdict(sizes),
        **several,
        "source": dict(source),
        "verification": dict(verification),
        "memory": memory,
        "files": dict(files),
    }
