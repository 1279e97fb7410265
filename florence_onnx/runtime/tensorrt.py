"""TensorRT engines: the shapes that they are built for, the folders that they are kept in, and building them.

ONNX Runtime's TensorRT provider builds and runs the engines, so everything else is as on CUDA. For each graph it writes
an engine file and a small graph that names it (an EP context model), which is loaded instead of the original graph. An
engine is only valid for one kind of GPU, one version of TensorRT and of ONNX Runtime, one bundle and one set of shapes.
The name of its folder contains all of these, so that a change of any leads to another folder and never to a wrong
engine.

The precision is the bundle's, fp16 or fp32, but not node by node: ONNX Runtime's provider (1.31) builds weakly typed
networks, in which TensorRT may compute in fp16 what an fp16 graph has in fp32; only a run on a GPU shows what that does
to answers. int8 and fp8 vision encoders are not offered: gains of 5 to 20 % were reported for such models, to be
measured on a GPU before they are worth the errors of another precision.
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
from florence_onnx.runtime.cuda import Gpu

ENGINES = "engines"
"""Name of the folder, in a bundle or in the user's cache, that holds a folder for each set of engines."""
ENVIRONMENT_VARIABLE = "FLORENCE_ONNX_ENGINE_CACHE"
"""Environment variable that replaces the user's cache."""
CONTEXT_SUFFIX = "_ctx.onnx"
DEFAULT_MAX_BATCH = 8
MAX_TOKENS = 16
"""Most tokens of a prompt in one step: one for each beam, or one and the draft behind it. An engine reserves memory for
the logits of all."""
CAPACITIES = (64, 4096)
"""Slots of a prompt's self KV cache: when it is new, and at most."""
FIRST_TEXT_LENGTH = 16
RUN_ONLY = ("device_id", "user_compute_stream", "has_user_compute_stream", "trt_context_memory_sharing_enable")
"""Provider options that do not change what is built, only where and how an engine runs."""
_log = logging.getLogger("florence_onnx")

Build = Callable[[Mapping[str, Path], Mapping[str, Mapping[str, str]]], None]
"""Opens a session for each graph, by name, with its provider options; that writes the engines."""


@dataclass(frozen=True)
class Target:
    """What a set of engines is built for, apart from the bundle."""

    gpu: Gpu
    tensorrt: str
    """Version of TensorRT, e.g. `"10.13.3"`."""
    onnxruntime: str
    """Version of ONNX Runtime."""
    max_batch: int = DEFAULT_MAX_BATCH
    """Most prompts in flight."""
    options: tuple[tuple[str, str], ...] = ()
    """The caller's provider options that engines depend on, sorted by name; see `engine_options`."""

    def folder(self, bundle: Bundle) -> str:
        """Name of the folder for the engines of a bundle."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.gpu.name.lower()).strip("-")
        major, minor = self.gpu.compute_capability
        parts = (slug, f"sm{major}{minor}", f"trt{self.tensorrt}", f"ort{self.onnxruntime}", bundle.precision)
        return "-".join((*parts, f"b{self.max_batch}", self._fingerprint(bundle)))

    def _fingerprint(self, bundle: Bundle) -> str:
        """Hash of all else: the bundle's description, which has its files' hashes, the shapes and the options."""
        digest = hashlib.sha256((bundle.path / DESCRIPTION).read_bytes())
        own = {graph: build_options(bundle, graph, Path(), self.max_batch) for graph in graphs(bundle)}
        digest.update(repr((own, self.options)).encode())
        return digest.hexdigest()[:12]


def engine_options(given: Mapping[str, object] | None) -> tuple[tuple[str, str], ...]:
    """The caller's provider options that engines may depend on: all but those of `RUN_ONLY`, sorted by name."""
    return tuple(sorted((name, str(value)) for name, value in (given or {}).items() if name not in RUN_ONLY))


def target(
    ort: ModuleType, max_batch: int = DEFAULT_MAX_BATCH, provider_options: Mapping[str, object] | None = None
) -> Target:
    """The target of engines for this machine.

    Args:
        ort: The module onnxruntime.
        max_batch: Most prompts in flight.
        provider_options: The caller's; `device_id` chooses the GPU.

    Raises:
        InputError: `device_id` is not a number.
        ProviderError: There is no GPU, or a library is missing; the message names it.
    """
    provider = "TensorrtExecutionProvider"
    if provider not in ort.get_available_providers():
        raise ProviderError(
            f"{provider} is not in the installed onnxruntime; to install it: pip install 'florence-onnx[gpu]'"
        )
    cuda.preload(ort)
    index = _device_id(provider_options)
    gpu = cuda.find_gpu(index)
    problems = [*cuda.diagnose(str(getattr(ort, "cuda_version", ""))), *cuda.diagnose_tensorrt(ort)]
    if problems or gpu is None:
        raise ProviderError(f"engines cannot be built here: {'; '.join(problems) or f'there is no GPU {index}'}")
    version = cuda.tensorrt_version(ort)
    return Target(gpu, version, str(ort.__version__), max_batch, engine_options(provider_options))


def _device_id(provider_options: Mapping[str, object] | None) -> int:
    given = (provider_options or {}).get("device_id", 0)
    try:
        return int(str(given))
    except ValueError as error:
        raise InputError(f"device_id must be the number of a GPU, got {given!r}") from error


def profiles(bundle: Bundle, max_batch: int) -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """The optimization profile of each graph: the smallest, most usual and largest shapes that its inputs can have.

    Returns:
        Shapes by graph, then by `"min"`, `"opt"` or `"max"`, then by input.
    """
    sizes = bundle.sizes
    width, height = sizes.image_size
    longest = sizes.max_positions - sizes.num_image_tokens
    text = min(FIRST_TEXT_LENGTH, longest)
    usual_batch, usual_tokens = 1, min(3, MAX_TOKENS)
    first, most = CAPACITIES
    decoder = {
        "min": _decoder_shapes(bundle, 1, 1, first, text),
        "opt": _decoder_shapes(bundle, usual_batch, usual_tokens, first, text),
        "max": _decoder_shapes(bundle, max_batch, MAX_TOKENS, most, longest),
    }
    features = (1, sizes.num_image_tokens, sizes.width)
    return {
        VISION_ENCODER: {
            name: {"pixel_values": (count, 3, height, width)}
            for name, count in (("min", 1), ("opt", 1), ("max", MAX_IMAGES))
        },
        TEXT_ENCODER: {
            name: {"input_ids": (1, length), "attention_mask": (1, length), "image_features": features}
            for name, length in (("min", text), ("opt", text), ("max", longest))
        },
        DECODER_TOP: decoder,
    }


def _decoder_shapes(
    bundle: Bundle, prompts: int, tokens: int, capacity: int, text_length: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the decoder's inputs, for `tokens` tokens of each of `prompts` prompts."""
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
    """Provider options with which opening a session builds the engine of a graph and writes it.

    Args:
        bundle: The bundle.
        graph: Name of one of its graphs.
        folder: Folder for the engine, the context model and the timing cache.
        max_batch: Most prompts in flight.
    """
    shapes = profiles(bundle, max_batch)[graph]
    return {
        **run_options(),
        "trt_fp16_enable": "1" if bundle.precision == "fp16" else "0",
        # Sums of layer normalisation in fp32; the provider recognises it only as Pow and ReduceMean, not as one node.
        "trt_layer_norm_fp32_fallback": "1",
        "trt_engine_cache_enable": "1",
        # Without trt_engine_cache_path the engine is written beside the context model, which names it by a relative path.
        "trt_engine_cache_prefix": Path(graph).stem,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_dump_ep_context_model": "1",
        "trt_ep_context_file_path": str(folder / context_model(graph)),
        "trt_ep_context_embed_mode": "0",
        **{f"trt_profile_{name}_shapes": _as_text(shapes[name]) for name in ("min", "opt", "max")},
    }


def run_options() -> dict[str, str]:
    """Provider options with which an engine is loaded and run."""
    return {"trt_engine_cache_enable": "1"}


def _as_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Shapes in the provider's notation: `name:1x3x768x768,name2:…`."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def context_model(graph: str) -> str:
    """File name of the EP context model that stands for a graph."""
    return Path(graph).stem + CONTEXT_SUFFIX


def graphs(bundle: Bundle) -> dict[str, Path]:
    """Names and paths of the graphs that engines are built from.

    Raises:
        ProviderError: There are no engines for the bundle's layout or precision.
    """
    if bundle.layout != "florence_onnx" or bundle.precision not in ("fp32", "fp16"):
        raise ProviderError(
            f"TensorRT engines are built from fp32 and fp16 bundles of this project; {bundle.path} is {bundle.precision} in "
            f"the layout of {bundle.layout}: export it with --precision fp16"
        )
    return bundle.stages(is_resident=True)


# ------------------------------------------------------------------------------------------------------------ folders


def engine_folders(bundle: Bundle) -> list[Path]:
    """The parent folders that engines of a bundle may be in: the bundle's own, and the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "florence_onnx"
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    return [bundle.path / ENGINES, Path(chosen) if chosen else cache / ENGINES]


@dataclass(frozen=True)
class Engines:
    """A set of engines on disk."""

    folder: Path
    max_batch: int
    """Most prompts in flight."""

    def graphs(self, bundle: Bundle) -> dict[str, Path]:
        """The context model to load for each graph."""
        return {graph: self.folder / context_model(graph) for graph in graphs(bundle)}


def find(bundle: Bundle, wanted: Target) -> Engines | None:
    """Finds the engines of a bundle for a target; of several, those for the largest batch.

    Args:
        bundle: The bundle.
        wanted: The target; engines for a larger batch fit too.

    Returns:
        None where there are none.

    Raises:
        ProviderError: There are no engines for the bundle's layout or precision.
    """
    graphs(bundle)
    found = []
    for parent in engine_folders(bundle):
        for folder in _entries(parent):
            batch = re.search(r"-b(\d+)-[0-9a-f]{12}$", folder.name)
            if batch is None or folder.name != replace(wanted, max_batch=int(batch[1])).folder(bundle):
                continue
            engines = Engines(folder, int(batch[1]))
            if engines.max_batch >= wanted.max_batch and _is_complete(engines, bundle):
                found.append(engines)
    return max(found, key=lambda engines: engines.max_batch, default=None)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # missing, or not readable
        return []


def _is_complete(engines: Engines, bundle: Bundle) -> bool:
    try:
        return all(path.is_file() for path in engines.graphs(bundle).values())
    except OSError as error:
        _log.warning("TensorRT engines in %s cannot be read: %s", engines.folder, error)
        return False


def build(bundle: Bundle, wanted: Target, build_engines: Build) -> Engines:
    """Builds the engines of a bundle, all or none. Takes minutes on most GPUs, and more memory than running them.

    Args:
        bundle: The bundle.
        wanted: The target.
        build_engines: Builds the engines with the given options.

    Raises:
        ProviderError: TensorRT does not accept a graph, or no folder is writable.
    """
    import shutil
    import tempfile

    sources = graphs(bundle)
    parent = _writable_folder(bundle)
    folder = parent / wanted.folder(bundle)
    _log.warning(
        "building TensorRT engines of %s for %s, once: this takes minutes; they are kept in %s",
        bundle.path.name,
        wanted.gpu.name,
        folder,
    )
    begin = time.monotonic()
    staging = Path(tempfile.mkdtemp(dir=parent, prefix=f".{folder.name[:40]}.incomplete-"))
    try:
        options = {graph: build_options(bundle, graph, staging, wanted.max_batch) for graph in sources}
        build_engines(sources, options)
        missing = [graph for graph in sources if not (staging / context_model(graph)).is_file()]
        if missing:
            raise ProviderError(f"TensorRT built no engine of {missing[0]}: it does not support some of the nodes")
        staging.chmod(0o755)  # mkdtemp gives access to this user only, but others may load engines that root has built
        _commit(staging, Engines(folder, wanted.max_batch), bundle)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _log.warning("engines built in %.0f s", time.monotonic() - begin)
    return Engines(folder, wanted.max_batch)


def _commit(staging: Path, engines: Engines, bundle: Bundle) -> None:
    """Gives a finished folder its final name, unless another process did so first, whose engines may be in use."""
    import shutil

    if _is_complete(engines, bundle):
        return
    shutil.rmtree(engines.folder, ignore_errors=True)  # may exist and lack a file
    try:
        staging.rename(engines.folder)
    except OSError as error:
        if not _is_complete(engines, bundle):
            raise ProviderError(f"TensorRT engines cannot be kept as {engines.folder}: {error}") from error


def _writable_folder(bundle: Bundle) -> Path:
    """The first of `engine_folders` that is writable."""
    problems: list[str] = []
    for folder in engine_folders(bundle):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
            problems.append(f"{folder} is not writable")
        except OSError as error:
            problems.append(f"{folder}: {error}")
    raise ProviderError(
        f"no folder for TensorRT engines ({'; '.join(problems)}); name one in the environment variable {ENVIRONMENT_VARIABLE}"
    )
