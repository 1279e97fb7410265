"""Loads the stages of a model: chooses a device and the graphs for it, and starts their sessions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from florence_onnx.bundles.bundle import KEY_INPUTS, VISION_ENCODER, Bundle
from florence_onnx.bundles.tokenizer import PromptTokenizer
from florence_onnx.errors import BundleFormatError, InputError, ProviderError
from florence_onnx.inference.decoder import DecoderShape, TextBackend, TextModel
from florence_onnx.inference.transformers_js import TransformersJsTextModel
from florence_onnx.inference.vision_encoders import VisionEncoders
from florence_onnx.runtime import cuda, graph_sizes, memory_errors, tensorrt
from florence_onnx.runtime import providers as provider_presets
from florence_onnx.runtime.engine import Engine, OnnxEngine, load_engines
from florence_onnx.runtime.load_options import LoadOptions
from florence_onnx.runtime.providers import BF16, Options, Provider, candidates
from florence_onnx.runtime.sessions import CPU, CUDA_PROVIDERS, TENSORRT, onnxruntime

if TYPE_CHECKING:
    from florence_onnx.inference.resident_model import ResidentModel

DISABLE_PREPACKING = "session.disable_prepacking"
"""Session config entry that leaves weights as they are in the file."""
DEFAULT_MAX_BATCH = 32
"""Most prompts in flight on a GPU. A decode step reads all weights once, for one prompt or for 32, so a batch costs
little more than a single prompt."""
_log = logging.getLogger("florence_onnx")


class Stages(NamedTuple):
    """The loaded parts of a model, in the order of the arguments of `Florence2`."""

    bundle: Bundle
    vision_encoder: VisionEncoders[Any]
    text_model: TextBackend
    provider: str
    """Name of the execution provider that runs the graphs."""
    precision: str
    """The bundle's precision, or bf16 where the provider computes in it."""
    tokenizer: PromptTokenizer
    resident: ResidentModel | None = None
    """The graphs with features and KV caches in device memory and continuous batching; None where `max_batch` is 0."""
    fit: Literal["stretch", "pad"] = "stretch"
    """How images are fitted into the model's size by default."""


def load(bundle: Bundle, options: LoadOptions) -> Stages:
    """Loads all stages of a model, and of several vision encoders that of the default image size.

    Args:
        bundle: The model on disk.
        options: Device, provider and their options.

    Raises:
        BundleError: A file is damaged, or the bundle has another precision.
        InputError: Options contradict each other or are malformed, or there is no vision encoder for the image size.
        ProviderError: The execution provider cannot run here.
    """
    if options.image_size is not None:
        bundle = bundle.resized(options.image_size)
    is_computed = options.is_bf16 and bundle.precision == "fp32"
    if not is_computed and not bundle.has_precision(options.precision):
        raise BundleFormatError(f"{bundle.path} has precision {bundle.precision}, not {options.precision}")
    _check_max_batch(options.max_batch, bundle)
    if options.device == "auto" and options.providers is None:
        if options.provider_options:
            raise InputError(f'provider_options needs a device by name, such as "openvino"; got {options.device!r}')
        return _load_best(bundle, options)
    return _load(bundle, options)


def preferred_precisions(device: str, providers: Sequence[Provider] | None) -> tuple[str, ...]:
    """Which bundle of several to load for a device, first choice first; errors as for `load`."""
    return provider_presets.preferred_precisions(device, providers, onnxruntime().get_available_providers())


def load_tokenizer(bundle: Bundle) -> PromptTokenizer:
    """Loads the tokenizer of a bundle."""
    return PromptTokenizer(bundle.tokenizer, pad_token_id=bundle.sizes.pad_token_id)


def _load_best(bundle: Bundle, options: LoadOptions) -> Stages:
    """Loads the stages on the first device on which they start and run, and logs which one that is."""
    *accelerators, last = candidates(onnxruntime().get_available_providers(), BF16 if options.is_bf16 else None)
    may_be_resident = options.max_batch != 0
    if may_be_resident and TENSORRT in onnxruntime().get_available_providers() and _has_engines(bundle, options):
        accelerators.insert(0, "tensorrt")
    for device in accelerators:
        try:
            stages = _load(bundle, replace(options, device=device))
        except ProviderError as error:
            _log.warning("device auto: %s is installed but cannot run: %s", device, error)
        else:
            _log.info("device auto: %s", device)
            return stages
    _log.info("device auto: %s", last)
    return _load(bundle, replace(options, device=last))


def _has_engines(bundle: Bundle, options: LoadOptions) -> bool:
    """Whether the bundle has TensorRT engines for this GPU and these versions; opens no session."""
    try:
        wanted = tensorrt.target(onnxruntime(), options.max_batch or 1)
        found = tensorrt.find(bundle, wanted)
    except ProviderError as error:
        _log.info("device auto: no TensorRT: %s", error)
        return False
    if found is None:
        _log.info("device auto: no TensorRT engines for this GPU; build them with: florence-onnx build-engines")
    return found is not None


def _check_max_batch(max_batch: int | None, bundle: Bundle) -> None:
    if max_batch is None:
        return
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 0:
        raise InputError(f"max_batch must be a whole number of at least 0 (no continuous batching), got {max_batch!r}")
    if max_batch and bundle.layout != "florence_onnx":
        raise InputError(
            f"max_batch needs a bundle of florence_onnx's own layout; {bundle.path} has that of {bundle.layout}"
        )


def _load(bundle: Bundle, options: LoadOptions) -> Stages:
    from concurrent.futures import ThreadPoolExecutor

    provider = _provider(options)
    # parsing the tokenizer takes a third of a second, as long as loading a graph: both at the same time
    with ThreadPoolExecutor(1) as pool:
        tokenizer = pool.submit(load_tokenizer, bundle)
        if provider == TENSORRT and bundle.layout == "florence_onnx":
            engines, max_batch = _load_tensorrt(bundle, options)
        else:
            max_batch = _max_batch(bundle, provider, options.max_batch)
            graphs = bundle.stages(is_resident=max_batch > 0)
            names = [KEY_INPUTS[graph] for graph in graphs]
            engines = load_engines(list(graphs.values()), names, options, cuda_graphs=max_batch > 0)
    graph_sizes.check(bundle, dict(zip(bundle.stages(is_resident=max_batch > 0), engines, strict=True)))
    first, *text = engines
    encoders = VisionEncoders(bundle, first, _vision_opener(provider, options, max_batch))
    backend = text_backend(bundle, text)
    if provider in CUDA_PROVIDERS:
        _check_kernels(bundle, text[0])
    precision = BF16 if options.is_bf16 else bundle.precision
    resident = _resident(bundle, encoders, (text[0], text[1]), max_batch) if max_batch else None
    return Stages(bundle, encoders, backend, first.provider, precision, tokenizer.result(), resident, options.fit)


def _vision_opener(provider: str, options: LoadOptions, max_batch: int) -> Callable[[Bundle], OnnxEngine] | None:
    """Loads vision encoders of further image sizes; None for TensorRT, whose engines are built for one size.

    On the CPU a further one reads its weights where they are mapped from the bundle's file, instead of packing a copy for
    its kernels: 61 MiB instead of 383 for Florence-2-base at 64 pixels, and 15 % slower in batches of eight
    (benchmarks/results/omniparser.md). The graph cache maps packed weights already.
    """
    if provider == TENSORRT:
        return None
    if provider == CPU and options.graph_cache_folder is None:
        options = replace(options, session_options={DISABLE_PREPACKING: "1", **(options.session_options or {})})

    def load_encoder(resized: Bundle) -> OnnxEngine:
        path = resized.graph(VISION_ENCODER)
        with memory_errors.said_as_such(str(path), [path]):
            engine = OnnxEngine(path, options, expected_inputs=KEY_INPUTS[VISION_ENCODER], cuda_graphs=max_batch > 0)
        graph_sizes.check(resized, {VISION_ENCODER: engine})
        return engine

    return load_encoder


def _provider(options: LoadOptions) -> str:
    available = onnxruntime().get_available_providers()
    return provider_presets.resolve(options.device, options.providers, available)[0][0]


def _max_batch(bundle: Bundle, provider: str, wanted: int | None) -> int:
    """Most prompts in flight; 0 where all tensors pass through the host."""
    if wanted is not None:
        return wanted
    return DEFAULT_MAX_BATCH if provider in CUDA_PROVIDERS and bundle.layout == "florence_onnx" else 0


def _load_tensorrt(bundle: Bundle, options: LoadOptions) -> tuple[list[OnnxEngine], int]:
    """Loads the TensorRT engines of a bundle, built first if there are none, and how many prompts they take."""
    if options.max_batch == 0:
        raise InputError(
            'max_batch=0 passes all tensors through the host, which device="tensorrt" cannot do; use device="cuda"'
        )
    wanted = tensorrt.target(onnxruntime(), options.max_batch or 1, _tensorrt_options(options))
    found = tensorrt.find(bundle, wanted)
    if found is None:
        found = build_engines(bundle, options.max_batch or tensorrt.DEFAULT_MAX_BATCH, options)
    if not options.providers:
        options = replace(options, provider_options={**tensorrt.run_options(), **(options.provider_options or {})})
    graphs = found.graphs(bundle)
    names = [KEY_INPUTS[graph] for graph in graphs]
    engines = load_engines(list(graphs.values()), names, options, cuda_graphs=True)
    return engines, options.max_batch or found.max_batch


def build_engines(bundle: Bundle, max_batch: int, options: LoadOptions | None = None) -> tensorrt.Engines:
    """Builds the TensorRT engines of a bundle for the GPU of this machine.

    Args:
        bundle: An fp32 or fp16 bundle.
        max_batch: Most prompts in flight.
        options: Session options, and options of the TensorRT provider.

    Raises:
        ProviderError: There is no GPU or no TensorRT, or TensorRT rejects a graph.
    """
    options = options or LoadOptions()
    own = _tensorrt_options(options)

    def build(graphs: Mapping[str, Path], by_graph: Mapping[str, Mapping[str, str]]) -> None:
        # one after the other: building an engine needs several times the memory of running it
        for graph, path in graphs.items():
            _log.warning("building the engine of %s", graph)
            more = {**by_graph[graph], **own}
            OnnxEngine(
                path,
                LoadOptions(
                    "tensorrt", provider_options=more, session_options=options.session_options, graph_cache=False
                ),
            )

    return tensorrt.build(bundle, tensorrt.target(onnxruntime(), max_batch, own), build)


def _tensorrt_options(options: LoadOptions) -> Options:
    """The caller's options of the TensorRT provider, from `provider_options` or from an entry of `providers`."""
    if not options.providers:
        return options.provider_options or {}
    available = onnxruntime().get_available_providers()
    return dict(provider_presets.resolve("auto", options.providers, available)).get(TENSORRT, {})


def _check_kernels(bundle: Bundle, engine: OnnxEngine) -> None:
    """Runs the text encoder, the smallest graph, once.

    An ONNX Runtime that was built without kernels for this GPU's architecture creates sessions and fails only when it
    runs them. Without this check `device="auto"` would choose it.

    Raises:
        ProviderError: The run failed.
    """
    sizes = bundle.sizes
    num_tokens = min(tensorrt.FIRST_TEXT_LENGTH, sizes.max_positions - sizes.num_image_tokens)
    ids = np.full((1, num_tokens), sizes.pad_token_id, dtype=np.int64)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "image_features": np.zeros((1, sizes.num_image_tokens, sizes.width), dtype=np.float32),
    }
    try:
        engine.run({name: inputs[name] for name in engine.inputs})
    except ProviderError as error:
        found = cuda.find_gpu()
        gpu = f"this GPU ({found.name}, sm_{''.join(map(str, found.compute_capability))})" if found else "this GPU"
        raise ProviderError(
            f"{engine.provider} starts but cannot run: {error}. The installed onnxruntime may have no kernels for "
            f"{gpu}: on a Jetson install NVIDIA's build instead of the one from PyPI"
        ) from error


def _resident(
    bundle: Bundle, encoders: VisionEncoders[OnnxEngine], text: tuple[OnnxEngine, OnnxEngine], max_batch: int
) -> ResidentModel:
    from florence_onnx.inference.decoder_call import ResidentSizes
    from florence_onnx.inference.resident_model import ResidentModel

    sizes = ResidentSizes(decoder_shape(bundle), bundle.sizes.num_image_tokens, bundle.sizes.width)
    max_tokens = tensorrt.MAX_TOKENS if text[-1].provider == TENSORRT else None
    return ResidentModel(encoders, text, sizes, max_batch, max_tokens)


def decoder_shape(bundle: Bundle) -> DecoderShape:
    """The sizes of a bundle's decoder and its self KV cache."""
    sizes = bundle.sizes
    return DecoderShape(
        sizes.decoder_layers, sizes.decoder_heads, sizes.head_dim, sizes.max_positions, sizes.vocab_size
    )


def text_backend(bundle: Bundle, engines: Sequence[Engine]) -> TextBackend:
    """Puts the text graphs of either layout behind one interface.

    Args:
        bundle: The model on disk.
        engines: Its text graphs, in the order of `Bundle.stages`.

    Raises:
        BundleFormatError: The decoder has another number of layers than the bundle's description says.
    """
    sizes = bundle.sizes
    found = sum(name.startswith("past_key_values.") for name in engines[-1].inputs)
    per_layer = 4 if bundle.layout == "transformers.js" else 2
    if found != per_layer * sizes.decoder_layers:
        raise BundleFormatError(
            f"{bundle.path}: the decoder has {found // per_layer} layers, its description says {sizes.decoder_layers}; "
            "export or download it again"
        )
    shape = decoder_shape(bundle)
    if bundle.layout == "transformers.js":
        embed_tokens, encoder, decoder = engines
        return TransformersJsTextModel(embed_tokens, encoder, decoder, shape)
    text_encoder, decoder = engines
    return TextModel(text_encoder, decoder, shape)
