"""TensorRT engines: which shapes they are built for, where they lie, and when they must be built again.

ONNX Runtime's TensorRT provider builds and runs them, so that everything else is as on CUDA. It writes a small graph that names an
engine file (an EP context model); that is what is loaded afterwards. An engine is good for one card, one TensorRT, one ONNX Runtime, one
bundle and one set of shapes. All of these are in the name of its folder, so that a change of any makes another folder and never a wrong
engine.

Precision is that of the bundle, fp16 or fp32, but not of each node: ONNX Runtime's provider (1.31) builds weakly typed networks, in
which TensorRT may compute in fp16 what an fp16 graph has in fp32. What that does to answers only a card can tell. int8 and fp8
vision encoders are not offered: for models of this kind gains of 5 to 20 % were reported, which has to be measured on a card before
it is worth another precision's errors.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from florence_onnx.bundles.bundle import DECODER_TOP, DESCRIPTION, TEXT_ENCODER, VISION_ENCODER, Bundle
from florence_onnx.bundles.memory import MAX_IMAGES
from florence_onnx.errors import InputError, ProviderError
from florence_onnx.runtime import cuda
from florence_onnx.runtime.cuda import Card

ENGINES = "engines"
"""Folder of a bundle, or of the user's cache, that holds folders of engines."""
ENVIRONMENT_VARIABLE = "FLORENCE_ONNX_ENGINE_CACHE"
CONTEXT_SUFFIX = "_ctx.onnx"
DEFAULT_MAX_BATCH = 8
MAX_TOKENS = 16
"""Tokens of a prompt in one step: its beams, or a token and what is drafted behind it. The logits of all are in an engine's memory."""
CAPACITIES = (64, 4096)
"""Slots of a prompt's cache at first and at most."""
FIRST_TEXT_LENGTH = 16
RUN_ONLY = ("device_id", "user_compute_stream", "has_user_compute_stream", "trt_context_memory_sharing_enable")
"""Provider options that say where and how an engine runs, and nothing about what is built."""
_log = logging.getLogger("florence_onnx")

Build = Callable[[Mapping[str, Path], Mapping[str, Mapping[str, str]]], None]
"""Opens a session for every graph with its provider options, which writes the engines."""


@dataclass(frozen=True)
class Target:
    """What engines are built for."""

    card: Card
    tensorrt: str
    """Version, e.g. `"10.13.3"`."""
    onnxruntime: str
    max_batch: int = DEFAULT_MAX_BATCH
    """Most prompts decoded together."""
    options: tuple[tuple[str, str], ...] = ()
    """Provider options of the caller's that an engine may depend on, in order; see `engine_options`."""

    def folder(self, bundle: Bundle) -> str:
        """Name of the folder of a bundle's engines."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.card.name.lower()).strip("-")
        major, minor = self.card.compute_capability
        parts = (slug, f"sm{major}{minor}", f"trt{self.tensorrt}", f"ort{self.onnxruntime}", bundle.precision)
        return "-".join((*parts, f"b{self.max_batch}", self._fingerprint(bundle)))

    def _fingerprint(self, bundle: Bundle) -> str:
        """Of everything else that engines depend on: the bundle's files, whose hashes its description holds, shapes and other options."""
        digest = hashlib.sha256((bundle.path / DESCRIPTION).read_bytes())
        own = {graph: build_options(bundle, graph, Path(), self.max_batch) for graph in graphs(bundle)}
        digest.update(repr((own, self.options)).encode())
        return digest.hexdigest()[:12]


def engine_options(given: Mapping[str, object] | None) -> tuple[tuple[str, str], ...]:
    """Of a caller's provider options those that an engine may depend on: all but the few that only say where and how it runs."""
    return tuple(sorted((name, str(value)) for name, value in (given or {}).items() if name not in RUN_ONLY))


def target(
    ort: ModuleType, max_batch: int = DEFAULT_MAX_BATCH, provider_options: Mapping[str, object] | None = None
) -> Target:
    """What engines of this machine are built for.

    Args:
        ort: The module onnxruntime.
        max_batch: Most prompts decoded together.
        provider_options: The caller's, of which `device_id` says which card.

    Raises:
        InputError: `device_id` is no number.
        ProviderError: TensorRT or a card is missing; says what.
    """
    provider = "TensorrtExecutionProvider"
    if provider not in ort.get_available_providers():
        raise ProviderError(
            f"{provider} is not in the installed onnxruntime; it comes with: pip install 'florence-onnx[gpu]'"
        )
    cuda.preload(ort)
    index = _device_id(provider_options)
    found = cuda.card(index)
    missing = [*cuda.obstacles(str(getattr(ort, "cuda_version", ""))), *cuda.tensorrt_obstacles(ort)]
    if missing or found is None:
        raise ProviderError(f"engines cannot be built here: {'; '.join(missing) or f'there is no card {index}'}")
    version = cuda.tensorrt_version(ort)
    return Target(found, version, str(ort.__version__), max_batch, engine_options(provider_options))


def _device_id(provider_options: Mapping[str, object] | None) -> int:
    given = (provider_options or {}).get("device_id", 0)
    try:
        return int(str(given))
    except ValueError as error:
        raise InputError(f"device_id must be the number of a card, got {given!r}") from error


def profiles(bundle: Bundle, max_batch: int) -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """The least, the usual and the greatest shapes that the runtime gives each graph.

    Returns:
        By graph, then `"min"`, `"opt"` and `"max"`, then input.
    """
    sizes = bundle.sizes
    width, height = sizes.image_size
    room = sizes.max_positions - sizes.num_image_tokens
    text = min(FIRST_TEXT_LENGTH, room)
    usual_batch, usual_tokens = 1, min(3, MAX_TOKENS)
    first, most = CAPACITIES
    decoder = {
        "min": _decoder_shapes(bundle, 1, 1, first, text),
        "opt": _decoder_shapes(bundle, usual_batch, usual_tokens, first, text),
        "max": _decoder_shapes(bundle, max_batch, MAX_TOKENS, most, room),
    }
    features = (1, sizes.num_image_tokens, sizes.width)
    return {
        VISION_ENCODER: {
            name: {"pixel_values": (count, 3, height, width)}
            for name, count in (("min", 1), ("opt", 1), ("max", MAX_IMAGES))
        },
        TEXT_ENCODER: {
            name: {"input_ids": (1, length), "attention_mask": (1, length), "image_features": features}
            for name, length in (("min", text), ("opt", text), ("max", room))
        },
        DECODER_TOP: decoder,
    }


def _decoder_shapes(
    bundle: Bundle, prompts: int, tokens: int, capacity: int, text_length: int
) -> dict[str, tuple[int, ...]]:
    sizes = bundle.sizes
    heads, size = sizes.decoder_heads, sizes.head_dim
    length = sizes.num_image_tokens + text_length
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("input_ids", "positions", "slots"), (prompts, tokens))
    shapes |= {"visible": (prompts, tokens, capacity), "encoder_attention_mask": (prompts, length)}
    for layer in range(sizes.decoder_layers):
        shapes[f"cross_key_values.{layer}.key"] = (prompts, heads, size, length)
        shapes[f"cross_key_values.{layer}.value"] = (prompts, heads, length, size)
        for part in ("key", "value"):
            shapes[f"past_key_values.{layer}.{part}"] = (prompts, heads, capacity, size)
    return shapes


def build_options(bundle: Bundle, graph: str, folder: Path, max_batch: int) -> dict[str, str]:
    """Provider options under which opening a session writes the engine of a graph.

    Args:
        bundle: The bundle.
        graph: One of its graphs.
        folder: Where engine, context model and timing cache go.
        max_batch: Most prompts decoded together.
    """
    shapes = profiles(bundle, max_batch)[graph]
    return {
        **run_options(),
        "trt_fp16_enable": "1" if bundle.precision == "fp16" else "0",
        # sums of normalisation in fp32 where it is spelt as Pow and ReduceMean, which is all that the provider looks for
        "trt_layer_norm_fp32_fallback": "1",
        "trt_engine_cache_enable": "1",
        # no trt_engine_cache_path: the engine lies beside the context model, which names it by a relative path
        "trt_engine_cache_prefix": Path(graph).stem,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_dump_ep_context_model": "1",
        "trt_ep_context_file_path": str(folder / context_model(graph)),
        "trt_ep_context_embed_mode": "0",
        **{f"trt_profile_{name}_shapes": _as_text(shapes[name]) for name in ("min", "opt", "max")},
    }


def run_options() -> dict[str, str]:
    """Provider options under which an engine is loaded and run."""
    return {"trt_engine_cache_enable": "1"}


def _as_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """As the provider reads shapes: `name:1x3x768x768,name2:…`."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def context_model(graph: str) -> str:
    """File name of the graph that names an engine."""
    return Path(graph).stem + CONTEXT_SUFFIX


def graphs(bundle: Bundle) -> dict[str, Path]:
    """What engines are built from.

    Raises:
        ProviderError: The bundle's layout or precision has none.
    """
    if bundle.layout != "florence_onnx" or bundle.precision not in ("fp32", "fp16"):
        raise ProviderError(
            f"TensorRT engines are built from fp32 and fp16 bundles of this project's; {bundle.path} is {bundle.precision} in "
            f"the layout of {bundle.layout}: export it with --precision fp16"
        )
    return bundle.stages(is_resident=True)


# ------------------------------------------------------------------------------------------------------------ folders


def places(bundle: Bundle) -> list[Path]:
    """Folders in which engines of a bundle may lie: with it, or, where that cannot be written to, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "florence_onnx"
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    return [bundle.path / ENGINES, Path(chosen) if chosen else cache / ENGINES]


@dataclass(frozen=True)
class Engines:
    """Engines that are built."""

    folder: Path
    max_batch: int
    """Most prompts that they take together."""

    def graphs(self, bundle: Bundle) -> dict[str, Path]:
        """What to load in place of each graph."""
        return {graph: self.folder / context_model(graph) for graph in graphs(bundle)}


def find(bundle: Bundle, wanted: Target) -> Engines | None:
    """Engines for this card, these versions and this very bundle, those for the most prompts first; None where there are none.

    Args:
        bundle: The bundle.
        wanted: For what; they take at least its `max_batch` prompts.

    Raises:
        ProviderError: The bundle's layout or precision has no engines.
    """
    graphs(bundle)
    found = []
    for place in places(bundle):
        for folder in _entries(place):
            batch = re.search(r"-b(\d+)-[0-9a-f]{12}$", folder.name)
            if batch is None or folder.name != replace(wanted, max_batch=int(batch[1])).folder(bundle):
                continue
            engines = Engines(folder, int(batch[1]))
            if engines.max_batch >= wanted.max_batch and _is_complete(engines, bundle):
                found.append(engines)
    return max(found, key=lambda engines: engines.max_batch, default=None)


def _entries(place: Path) -> list[Path]:
    try:
        return list(place.iterdir())
    except OSError:  # none there, or not for us
        return []


def _is_complete(engines: Engines, bundle: Bundle) -> bool:
    try:
        return all(path.is_file() for path in engines.graphs(bundle).values())
    except OSError as error:
        _log.warning("TensorRT engines in %s cannot be read: %s", engines.folder, error)
        return False


def build(bundle: Bundle, wanted: Target, build_engines: Build) -> Engines:
    """Builds engines, all or nothing; minutes on most cards, and more memory than running them.

    Args:
        bundle: The bundle.
        wanted: For what.
        build_engines: Does it.

    Raises:
        ProviderError: TensorRT refuses a graph, or there is no place to write to.
    """
    import shutil
    import tempfile

    sources = graphs(bundle)
    place = _writable(bundle)
    folder = place / wanted.folder(bundle)
    _log.warning(
        "building TensorRT engines of %s for %s, once: this takes minutes; they are kept in %s",
        bundle.path.name,
        wanted.card.name,
        folder,
    )
    begin = time.monotonic()
    staging = Path(tempfile.mkdtemp(dir=place, prefix=f".{folder.name[:40]}.incomplete-"))
    try:
        options = {graph: build_options(bundle, graph, staging, wanted.max_batch) for graph in sources}
        build_engines(sources, options)
        missing = [graph for graph in sources if not (staging / context_model(graph)).is_file()]
        if missing:
            raise ProviderError(f"TensorRT built no engine of {missing[0]}: some of its nodes are not taken")
        staging.chmod(0o755)  # mkdtemp's is for its maker alone, and others may load what root has built
        _settle(staging, Engines(folder, wanted.max_batch), bundle)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _log.warning("engines built in %.0f s", time.monotonic() - begin)
    return Engines(folder, wanted.max_batch)


def _settle(staging: Path, engines: Engines, bundle: Bundle) -> None:
    """Gives a finished folder its name, unless another process was faster: its engines are as good, and may be in use."""
    import shutil

    if _is_complete(engines, bundle):
        return
    shutil.rmtree(engines.folder, ignore_errors=True)  # it lacks a file
    try:
        staging.rename(engines.folder)
    except OSError as error:
        if not _is_complete(engines, bundle):
            raise ProviderError(f"TensorRT engines cannot be kept as {engines.folder}: {error}") from error


def _writable(bundle: Bundle) -> Path:
    refused: list[str] = []
    for place in places(bundle):
        try:
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
            refused.append(f"{place} cannot be written to")
        except OSError as error:
            refused.append(f"{place}: {error}")
    raise ProviderError(
        f"no place for TensorRT engines ({'; '.join(refused)}); name a folder in the environment variable {ENVIRONMENT_VARIABLE}"
    )
