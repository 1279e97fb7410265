"""`Florence2`: composes the stages. Every request starts and ends here:

```text
tasks, text_inputs, regions ─_make_requests─▶ _Request ─_encode_prompts─▶ input_ids (P, T), attention_mask (P, T)
images, input_ids, attention_mask ─Answering.answer─▶ EncodedImage, GeneratedSequence
GeneratedSequence ─PromptTokenizer.decode─▶ text ─tasks.parse─▶ results ─▶ Prediction
```
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from florence_onnx import tasks
from florence_onnx.answers.locations import Region
from florence_onnx.answers.placed import region_to_input, to_source
from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import hub, memory
from florence_onnx.bundles.bundle import Bundle, ImageSize
from florence_onnx.bundles.tokenizer import PromptTokenizer
from florence_onnx.errors import InputError, TextInputError
from florence_onnx.generation.generate import new_search
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.generation.search import GeneratedSequence, Ids, Search, TeacherForcing
from florence_onnx.images import decoding
from florence_onnx.images.decoding import ImageInput
from florence_onnx.images.placement import Fit, check_fit
from florence_onnx.images.preprocessing import Preparation
from florence_onnx.inference.answering import Answering, HostAnswering, to_image
from florence_onnx.inference.decoder import TextBackend
from florence_onnx.inference.vision_encoders import VisionEncoders
from florence_onnx.loading import load, load_tokenizer, preferred_precisions
from florence_onnx.prediction import EncodedImage, Prediction
from florence_onnx.runtime.engine import Engine
from florence_onnx.runtime.load_options import LoadOptions
from florence_onnx.runtime.providers import BF16, Options, Provider
from florence_onnx.runtime.sessions import CPU, SessionOptions
from florence_onnx.tasks import Task, parse

if TYPE_CHECKING:
    from florence_onnx.inference.resident_model import ResidentModel

R = TypeVar("R")
EXACT_PRECISIONS = ("fp32", "fp16")
"""Precisions of a vision encoder in which an image's features do not depend on the images beside it."""
_log = logging.getLogger("florence_onnx")


@dataclass(frozen=True)
class _Request:
    """A task about an image, its input checked and formatted. Its index is that of its row in `input_ids`."""

    task: Task[Any]
    image: ImageInput | EncodedImage
    formatted_input: str
    """The part of the prompt that the caller chose: text, a region's location tokens, or nothing."""
    region: Region | None = None
    """The region, in bins of the source image."""

    @property
    def prompt(self) -> str:
        """The whole prompt, ready for the tokenizer."""
        return self.task.fill_prompt(self.formatted_input)

    def placed(self, encoded: EncodedImage) -> _Request:
        """The same about the encoded image, with the region in the bins of the model's input."""
        assert self.region is not None and encoded.placement is not None
        moved = region_to_input(self.region, encoded.placement)
        return replace(self, image=encoded, formatted_input=self.task.format_input(None, moved))


class Florence2:
    """A Florence-2 model on ONNX Runtime. All methods may be called from several threads at once."""

    def __init__(
        self,
        bundle: Bundle,
        vision_encoder: Engine | VisionEncoders[Any],
        text_model: TextBackend,
        provider: str,
        precision: str | None = None,
        tokenizer: PromptTokenizer | None = None,
        resident: ResidentModel | None = None,
        fit: Fit = "stretch",
    ) -> None:
        """Composes stages that are loaded already; call `from_pretrained` or `from_bundle` instead."""
        self._bundle = bundle
        if not isinstance(vision_encoder, VisionEncoders):
            vision_encoder = VisionEncoders(bundle, vision_encoder)
        self._encoders: VisionEncoders[Any] = vision_encoder
        self._vision_encoder: Engine = self._encoders.default
        self._fit = check_fit(fit)
        self._text_model = text_model
        self._provider = provider
        self._precision = precision or bundle.precision
        self._tokenizer = tokenizer or load_tokenizer(bundle)
        self._resident = resident
        if resident is None:
            can_batch = provider == CPU and (bundle.vision_precision or bundle.precision) in EXACT_PRECISIONS
            self._answering: Answering = HostAnswering(bundle, self._encoders, text_model, can_batch=can_batch)
        else:
            # takes time to import, and a CPU does not need it
            from florence_onnx.inference.device_answering import DeviceAnswering

            self._answering = DeviceAnswering(bundle, resident)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = bundles.DEMO,
        *,
        device: str = "auto",
        precision: str | None = None,
        providers: Sequence[Provider] | None = None,
        provider_options: Options | None = None,
        session_options: SessionOptions | None = None,
        graph_cache: bool | str | os.PathLike[str] | None = None,
        max_batch: int | None = None,
        image_size: ImageSize | None = None,
        fit: Fit = "stretch",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Florence2:
        """Loads a model.

        Args:
            name: A bundle directory, a hub repository (`owner/name`: a bundle, or a repository in the layout of
                `onnx-community/Florence-2-*`), or `"demo"`, the built-in model, which knows drawn shapes only.
            device: `"auto"`, `"cpu"`, `"cuda"`, `"tensorrt"` or `"openvino"`.
            precision: Which files to load (`"fp32"`, `"fp16"`, `"int8"`, …), or `"bf16"`: the fp32 files, computed in
                bf16 by a provider that can (OpenVINO, on a processor with bf16 arithmetic). None loads the one that
                there is; of several, int8 on a CPU, fp16 with CUDA or TensorRT, fp32 with OpenVINO.
            providers: ONNX Runtime execution providers (names, or names with options), first choice first; replaces
                `device`.
            provider_options: Options of the device's execution provider, which override this package's, e.g. for
                `"openvino"` `{"num_of_threads": 4, "cache_dir": "…"}`; a dict as a value is passed on as JSON.
            session_options: Attributes and config entries of `onnxruntime.SessionOptions`, which override this
                package's, e.g. `{"intra_op_num_threads": 2, "session.intra_op.allow_spinning": 0}`.
            graph_cache: Where to cache optimised graphs (CPU only): a folder, True (`~/.cache/florence_onnx/graphs`),
                False (nowhere), or None for the environment variable `FLORENCE_ONNX_GRAPH_CACHE`. Loading gets faster
                and processes share the weights; the cache takes twice the bundle's size on disk.
            max_batch: Most prompts in flight. Prompts of all threads are then decoded as one continuous batch: a prompt
                enters it at any decode step and leaves it when it is finished, and features and KV caches stay in
                device memory. 0 decodes each call by itself, through the host. None is 32 on a GPU and 0 on a CPU. For
                the device memory that this needs see `florence-onnx info`.
            image_size: Pixels at which images are read where a call does not say: the side of a square, or
                `(width, height)`. None for the bundle's default. Only the vision encoder of this size is loaded; those
                of others, if the bundle has some, at the first call that asks for them.
            fit: How images of other aspect ratios are fitted where a call does not say: `"stretch"`, as transformers
                does, or `"pad"`, with margins.
            revision: Branch, tag or commit of a hub repository.
            cache_dir: Where downloads are kept, instead of the hub client's default.

        Raises:
            BundleError: The model is missing, damaged or of another format.
            InputError: The bundle has no vision encoder for `image_size`, or options contradict each other.
            ProviderError: The execution provider cannot run here.
            MissingExtraError: No ONNX Runtime is installed.
        """
        files = "fp32" if precision == BF16 else precision
        preferred = preferred_precisions(device, providers) if files is None else (files,)
        bundle = hub.resolve(name, precision=files, preferred=preferred, revision=revision, cache_dir=cache_dir)
        options = LoadOptions(
            device=device,
            precision=precision,
            providers=providers,
            provider_options=provider_options,
            session_options=session_options,
            graph_cache=graph_cache,
            max_batch=max_batch,
            image_size=image_size,
            fit=check_fit(fit),
        )
        return cls.from_bundle(bundle, options)

    @classmethod
    def from_bundle(cls, bundle: Bundle, options: LoadOptions | None = None) -> Florence2:
        """Loads a model from a bundle that was read before; errors as for `from_pretrained`.

        Args:
            bundle: A bundle that `florence_onnx.bundles.bundle.read` or an export returned.
            options: The arguments of `from_pretrained` of the same names.
        """
        return cls(*load(bundle, options or LoadOptions()))

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes `(width, height)` in pixels at which the model can read images."""
        return self._bundle.image_sizes

    @property
    def max_batch(self) -> int:
        """Most prompts in flight, those of all threads together; 0 where each call is decoded by itself."""
        return 0 if self._resident is None else self._resident.max_batch

    # ------------------------------------------------------------------------------------------------------ requests

    def encode(
        self,
        image: ImageInput,
        *,
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
        apply_exif: bool = True,
        max_pixels: int = decoding.MAX_PIXELS,
        max_bytes: int = decoding.MAX_BYTES,
        timeout: float = decoding.TIMEOUT,
        public_only: bool = False,
        allowed_hosts: Collection[str] = (),
    ) -> EncodedImage:
        """Runs the vision encoder; its output serves any number of tasks.

        Args:
            image: Path, bytes, file object, PIL image, `(H, W, 3)` uint8 array, `http(s)` URL or `data:` URI.
            image_size: Pixels at which the model reads the image: one of `image_sizes`, `(width, height)` or the side of a
                square; None for the default of this model. Smaller is faster and sees less.
            fit: `"stretch"`, as transformers does, or `"pad"`, which keeps the aspect ratio with margins; None for the
                default of this model. Coordinates of results are those of the image in either case.
            apply_exif: Whether to apply the EXIF orientation. transformers does not: pass False to match it.
            max_pixels: Most pixels (width times height) to accept.
            max_bytes: Most bytes of a download or a `data:` URI.
            timeout: Seconds for a download, redirects included.
            public_only: For strings from untrusted callers: a string must be a URL and not a path, and must lead to the
                public internet, redirects included; proxies of the environment are not used.
            allowed_hosts: Exceptions to `public_only`: `HOST:PORT`, or `HOST` for its ports 80 and 443.

        Raises:
            ImageError: The image cannot be read.
            InputError: The model has no such image size, or `fit` or `allowed_hosts` is malformed.
        """
        preparation = self._prepare(image_size, fit)
        loaded = decoding.load(
            image,
            apply_exif=apply_exif,
            max_pixels=max_pixels,
            max_bytes=max_bytes,
            timeout=timeout,
            public_only=public_only,
            allowed_hosts=allowed_hosts,
            copy=True,
        )
        return self._answering.encode(loaded, preparation)

    def encode_batch(
        self,
        images: Iterable[ImageInput | EncodedImage],
        *,
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
    ) -> list[EncodedImage]:
        """Runs the vision encoder on several images, as many at a time as pays: on a CPU that is where they are small.

        Args:
            images: Images as for `encode`, with its defaults for URLs and EXIF; encoded ones are returned as they are.
                Those that occur several times, as the same object or the same name, are encoded once.
            image_size: As for `encode`.
            fit: As for `encode`.

        Returns:
            One per image, in order.

        Raises:
            InputError: As for `encode`, or an image was encoded by another model.
            ProviderError: The device failed.
        """
        return self._answering.encode_all(_as_images(images), self._prepare(image_size, fit))

    def _prepare(self, image_size: ImageSize | None, fit: Fit | None) -> Preparation:
        sizes = (self._bundle if image_size is None else self._bundle.resized(image_size)).sizes
        chosen = self._fit if fit is None else check_fit(fit)
        return Preparation(sizes.image_size, sizes.image_mean, sizes.image_std, chosen)

    def encode_pixels(self, pixel_values: npt.NDArray[np.float32]) -> list[EncodedImage]:
        """Runs the vision encoder on images that were preprocessed elsewhere, such as by transformers' processor.

        Args:
            pixel_values: `(B, 3, H, W)` float32, normalised, of one of the sizes that the model reads (`image_sizes`).

        Returns:
            B images; their `source_image` is what the pixels show, at that size.

        Raises:
            InputError: `pixel_values` has another shape.
            ProviderError: The device failed.
        """
        sizes = self._bundle.sizes
        values = np.asarray(pixel_values, dtype=np.float32)
        known = [(3, height, width) for width, height in self.image_sizes]
        if values.ndim != 4 or values.shape[1:] not in known:
            shapes = " or ".join(f"(B, 3, {height}, {width})" for _, height, width in known)
            sides = " or ".join(f"{width} x {height}" for _, height, width in known)
            raise InputError(
                f"pixel_values must be {shapes} for this model, got {values.shape}; preprocess images to {sides}"
            )
        return [self._answering.encode_pixels(each[None], to_image(each, sizes)) for each in values]

    def generate_tokens(
        self,
        images: Sequence[EncodedImage],
        input_ids: npt.NDArray[np.int64],
        attention_mask: npt.NDArray[np.int64] | None = None,
        options: GenerationOptions | None = None,
    ) -> list[GeneratedSequence]:
        """Generates from token ids: what `run_batch` does between the tokenizer and the parser.

        Args:
            images: P encoded images.
            input_ids: `(P, T)`, each a prompt as `<s>…</s>` without image tokens, padded on the right.
            attention_mask: `(P, T)`, 1 for tokens; None: every token that is not the padding token.
            options: Generation options.

        Raises:
            InputError: Shapes or ids do not fit, or an image was encoded by another model.
            TextInputError: A prompt is too long.
            ProviderError: The device failed.
        """
        config = self._bundle.generation.resolve(options)
        self._answering.check(config)
        ids, mask = self._check_input_ids(input_ids, attention_mask, len(images))
        counts = [each.num_image_tokens for each in images]
        self._check_lengths(mask, [f"row {row}" for row in range(len(images))], counts)
        _, sequences = self._answering.answer(
            images, ids, mask, lambda indices: new_search(len(indices), config, None), self._prepare(None, None)
        )
        return sequences

    @overload
    def run(
        self,
        task: Task[R],
        image: ImageInput | EncodedImage,
        *,
        text_input: str | None = None,
        region: Region | None = None,
        options: GenerationOptions | None = None,
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
    ) -> Prediction[R]: ...

    @overload
    def run(
        self,
        task: str,
        image: ImageInput | EncodedImage,
        *,
        text_input: str | None = None,
        region: Region | None = None,
        options: GenerationOptions | None = None,
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
    ) -> Prediction[Any]: ...

    def run(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        *,
        text_input: str | None = None,
        region: Region | None = None,
        options: GenerationOptions | None = None,
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
    ) -> Prediction[Any]:
        """Runs one task on one image.

        Args:
            task: A constant of `florence_onnx.tasks`, its slug (`"object-detection"`) or its token (`"<OD>"`).
            image: An image that `encode` accepts, or one that it returned.
            text_input: Text, for the tasks that need one.
            region: Region in location bins, for the tasks that need one; see `Region.from_pixels`.
            options: Generation options, which override the checkpoint's. With `num_return_sequences` the first answer is
                returned, and `Prediction.alternatives` has the others.
            image_size: Pixels at which the model reads the image, where it is not encoded already: one of `image_sizes`,
                `(width, height)` or the side of a square; None for the default of this model. Smaller is faster and sees
                less.
            fit: `"stretch"`, as transformers does, or `"pad"`, which keeps the aspect ratio with margins; None for the
                default of this model. Coordinates of results are those of the image in either case.

        Raises:
            InputError: The task, image, text, region or an option is wrong.
            ProviderError: The device failed.
        """
        return self.run_batch(
            [task], [image], text_inputs=[text_input], regions=[region], options=options, image_size=image_size, fit=fit
        )[0]

    def run_batch(
        self,
        tasks: Task[Any] | str | Iterable[Task[Any] | str],
        images: Iterable[ImageInput | EncodedImage],
        *,
        text_inputs: Iterable[str | None] | None = None,
        regions: Iterable[Region | None] | None = None,
        options: GenerationOptions | None = None,
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
    ) -> list[Prediction[Any]]:
        """Runs several requests as one batch.

        Every prediction is the one that `run` returns, with an exception: in int8 and int4 the text encoder quantizes
        activations with one scale for the whole batch, so a prediction may depend on the other requests.

        An image that occurs several times, as the same object or the same name, is encoded once.

        Args:
            tasks: One task for all images, or one per image.
            images: Images as for `run`, repeated where several tasks are run on one.
            text_inputs: One entry per image, None where the task takes no text.
            regions: One entry per image, None where the task takes no region.
            options: Generation options for all requests.
            image_size: As for `run`, for all images that are not encoded already; encoded ones may be of several sizes.
            fit: As for `run`.

        Returns:
            One prediction per image, in order.

        Raises:
            InputError: As for `run`, or the sequences differ in length.
            ProviderError: The device failed.
        """
        requests = _make_requests(tasks, images, text_inputs, regions)
        if not requests:
            return []
        preparation = self._prepare(image_size, fit)
        requests = self._place_regions(requests, preparation)
        config = self._bundle.generation.resolve(options)
        self._answering.check(config)
        input_ids, attention_mask = self._encode_prompts(requests, preparation)
        # Encoded without its prompt: there the text follows a space, which byte-level BPE makes part of the first
        # token, and an answer that repeats the text has no space there.
        lookup_ids = [self._tokenizer.encode_text(request.formatted_input) for request in requests]

        counts = [self._num_image_tokens(request.image, preparation) for request in requests]
        encoder_ids = self._encoder_ids(input_ids, attention_mask, counts)

        def make_search(indices: Sequence[int]) -> Search:
            return new_search(
                len(indices),
                config,
                [lookup_ids[index] for index in indices],
                [encoder_ids[index] for index in indices],
            )

        encoded, sequences = self._answering.answer(
            [request.image for request in requests], input_ids, attention_mask, make_search, preparation
        )
        return [
            self._make_prediction(request.task, each, sequence)
            for request, each, sequence in zip(requests, encoded, sequences, strict=True)
        ]

    def check_options(self, options: GenerationOptions | None) -> None:
        """Checks generation options without running anything.

        Args:
            options: As for `run`.

        Raises:
            OptionsError: They are not possible with this model on its device.
        """
        self._answering.check(self._bundle.generation.resolve(options))

    def score_tokens(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        token_ids: Sequence[int],
        *,
        text_input: str | None = None,
        region: Region | None = None,
    ) -> npt.NDArray[np.float32]:
        """Computes the logits at every position of a given answer (teacher forcing).

        Args:
            task: As for `run`.
            image: As for `run`.
            token_ids: L tokens from the decoder start token on, such as `Prediction.token_ids`.
            text_input: As for `run`.
            region: As for `run`.

        Returns:
            `(L - 1, V)` float32: row i has the logits after the first i + 1 tokens, before any logits processor.

        Raises:
            InputError: As for `run`, or `token_ids` is empty, too long, or has a token outside the vocabulary.
            ProviderError: The device failed.
        """
        preparation = self._prepare(None, None)
        requests = self._place_regions(_make_requests(task, [image], [text_input], [region]), preparation)
        self._check_tokens(token_ids)
        input_ids, attention_mask = self._encode_prompts(requests, preparation)
        logits = np.empty((len(token_ids) - 1, self._bundle.sizes.vocab_size), dtype=np.float32)
        if len(logits):  # nothing follows the last token
            self._answering.answer(
                [requests[0].image],
                input_ids,
                attention_mask,
                lambda _: TeacherForcing(token_ids, logits),
                preparation,
            )
        return logits

    def warm_up(self) -> None:
        """Runs every stage once on a blank image, so that the first real request is not slowed down by it.

        On a GPU a CUDA graph is captured when a shape of a decode step first occurs: this captures the shapes of a
        single prompt, greedy and with the checkpoint's number of beams.
        """
        width, height = self._bundle.sizes.image_size
        blank = PILImage.new("RGB", (width, height))
        for num_beams in (None, 1) if self.max_batch else (None,):
            # a checkpoint's number of answers may be more than one beam can give
            options = GenerationOptions(num_beams, max_new_tokens=4, min_new_tokens=3, num_return_sequences=1)
            self.run(tasks.CAPTION, blank, options=options)

    def info(self) -> dict[str, Any]:
        """The loaded bundle, its sizes and where it runs, ready for JSON."""
        bundle, sizes = self._bundle, self._bundle.sizes
        return {
            "path": str(bundle.path),
            "layout": bundle.layout,
            "precision": self._precision,
            "vision_precision": bundle.vision_precision or self._precision,
            "provider": self._provider,
            "max_batch": self.max_batch,
            "model": dict(vars(sizes)),
            "image_sizes": [self._describe_size(size) for size in self.image_sizes],
            "fit": self._fit,
            "generation": vars(bundle.generation.resolve(None)),
            "source": dict(bundle.source),
            "verification": dict(bundle.verification),
            "device_memory": memory.table(bundle),
        }

    def _describe_size(self, image_size: tuple[int, int]) -> dict[str, Any]:
        resized = self._bundle.resized(image_size)
        return {
            "image_size": image_size,
            "num_image_tokens": resized.sizes.num_image_tokens,
            "is_loaded": image_size in self._encoders.loaded,
            "device_memory": memory.table(resized),
        }

    # --------------------------------------------------------------------------------- between requests and stages

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        sizes = self._bundle.sizes
        if not 1 <= len(token_ids) <= sizes.max_positions + 1:
            raise InputError(f"token_ids must be 1 to {sizes.max_positions + 1} tokens, got {len(token_ids)}")
        if not all(0 <= token < sizes.vocab_size for token in token_ids):
            raise InputError(f"token_ids must be from 0 to {sizes.vocab_size - 1}, got {tuple(token_ids)!r}")

    def _place_regions(self, requests: Sequence[_Request], preparation: Preparation) -> list[_Request]:
        """Regions of images with margins in the bins of the model's input; encodes these images first, to know their size."""
        is_moved = [request.region is not None and _is_padded(request.image, preparation) for request in requests]
        moved = [request for request, needed in zip(requests, is_moved, strict=True) if needed]
        encoded = iter(self._answering.encode_all([request.image for request in moved], preparation))
        return [
            request.placed(next(encoded)) if needed else request
            for request, needed in zip(requests, is_moved, strict=True)
        ]

    def _num_image_tokens(self, image: ImageInput | EncodedImage, preparation: Preparation) -> int:
        if isinstance(image, EncodedImage):
            return image.num_image_tokens
        return self._bundle.resized(preparation.image_size).sizes.num_image_tokens

    def _encode_prompts(self, requests: Sequence[_Request], preparation: Preparation) -> tuple[Ids, Ids]:
        """The prompts' `input_ids` and `attention_mask`, both `(P, T)`; raises TextInputError where one is too long."""
        input_ids, attention_mask = self._tokenizer.encode([request.prompt for request in requests])
        counts = [self._num_image_tokens(request.image, preparation) for request in requests]
        self._check_lengths(attention_mask, [request.task.slug for request in requests], counts)
        return input_ids, attention_mask

    def _check_lengths(self, attention_mask: Ids, names: Sequence[str], counts: Sequence[int]) -> None:
        lengths = attention_mask.sum(axis=1)
        for name, length, num_image_tokens in zip(names, lengths, counts, strict=True):
            room = self._bundle.sizes.max_positions - num_image_tokens
            if length > room:
                raise TextInputError(
                    f"the prompt of {name} has {length} tokens; this model has room for {room} "
                    f"beside {num_image_tokens} image tokens: shorten text_input"
                )

    def _check_input_ids(self, input_ids: Ids, attention_mask: Ids | None, count: int) -> tuple[Ids, Ids]:
        sizes = self._bundle.sizes
        ids = np.asarray(input_ids, dtype=np.int64)
        if ids.ndim != 2 or len(ids) != count or not ids.size:
            raise InputError(f"input_ids must be ({count}, T), one row an image, got {ids.shape}")
        if ids.min() < 0 or ids.max() >= sizes.vocab_size:
            raise InputError(f"input_ids must be from 0 to {sizes.vocab_size - 1}, got {ids.min()} to {ids.max()}")
        mask = np.asarray(ids != sizes.pad_token_id if attention_mask is None else attention_mask, dtype=np.int64)
        if mask.shape != ids.shape or not mask[:, 0].all() or (np.diff(mask, axis=1) > 0).any():
            raise InputError(
                "attention_mask must be 1 for tokens and 0 for padding on the right, like input_ids in shape"
            )
        return ids, mask

    def _encoder_ids(self, input_ids: Ids, attention_mask: Ids, counts: Sequence[int]) -> list[list[int]]:
        """What `generate` takes for the text encoder's tokens: image tokens, then the prompt without padding."""
        image_token = self._tokenizer.image_token_id
        image = [] if image_token is None else [image_token]
        return [
            image * count + row[mask == 1].tolist()
            for row, mask, count in zip(input_ids, attention_mask, counts, strict=True)
        ]

    def _make_prediction(self, task: Task[Any], encoded: EncodedImage, sequence: GeneratedSequence) -> Prediction[Any]:
        text = self._tokenizer.decode(sequence.token_ids)
        results = _parse(task, text, encoded)
        others = tuple(self._make_prediction(task, encoded, other) for other in sequence.alternatives)
        return Prediction(results, task, text, sequence.token_ids, sequence.truncated, encoded.source_image, others)


def _parse(task: Task[Any], text: str, encoded: EncodedImage) -> Any:
    """The results of a generated text, in pixels of the source image."""
    placement = encoded.placement
    if placement is None or placement.fit == "stretch":
        return parse(task, text, encoded.size)
    return to_source(parse(task, text, placement.image_size), placement)


def _is_padded(image: ImageInput | EncodedImage, preparation: Preparation) -> bool:
    return image.is_padded if isinstance(image, EncodedImage) else preparation.fit == "pad"


def _as_images(images: Iterable[ImageInput | EncodedImage]) -> list[ImageInput | EncodedImage]:
    """The list of images that a batch method was given.

    Raises:
        InputError: It is a single image.
    """
    # a string or an array can be iterated over: without this check each letter or row would be taken for an image
    if isinstance(images, str | bytes | os.PathLike | np.ndarray | PILImage.Image | EncodedImage):
        raise InputError("images must be a list of images; for a single one call run")
    return list(images)


def _make_requests(
    task_or_tasks: Task[Any] | str | Iterable[Task[Any] | str],
    images: Iterable[ImageInput | EncodedImage],
    text_inputs: Iterable[str | None] | None,
    regions: Iterable[Region | None] | None,
) -> list[_Request]:
    """Checks and formats the arguments of `Florence2.run_batch`; one request per image."""
    images = _as_images(images)
    if isinstance(text_inputs, str):
        raise InputError("text_inputs must be a list with one entry per image, got a string")
    count = len(images)
    columns: Mapping[str, Sequence[Any]] = {
        "tasks": [task_or_tasks] * count if isinstance(task_or_tasks, str | Task) else list(task_or_tasks),
        "text_inputs": [None] * count if text_inputs is None else list(text_inputs),
        "regions": [None] * count if regions is None else list(regions),
    }
    for name, column in columns.items():
        if len(column) != count:
            raise InputError(f"{name} has {len(column)} entries for {count} images; give one each")
    requests = []
    for name, image, text, region in zip(
        columns["tasks"], images, columns["text_inputs"], columns["regions"], strict=True
    ):
        task = tasks.get(name)
        requests.append(_Request(task, image, task.format_input(text, region), region))
    return requests
