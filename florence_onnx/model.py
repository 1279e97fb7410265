"""`Florence2`: composes the stages. Every request starts and ends here:

```text
tasks, images, text_inputs, regions ─read_requests─▶ Request ─portions─▶ P requests at a time ─place─▶ with margins
prompts ─PromptTokenizer.encode─▶ input_ids (P, T), attention_mask (P, T)
images, input_ids, attention_mask ─Answering.answer─▶ EncodedImage, GeneratedSequence
GeneratedSequence ─PromptTokenizer.decode─▶ text ─parse_placed─▶ results ─▶ Prediction
```
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import AsyncGenerator, Collection, Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from florence_onnx import tasks
from florence_onnx.answers import calibration as calibrations
from florence_onnx.answers.locations import Region
from florence_onnx.batches import (
    DEVICE_BATCH_FACTOR,
    HOST_BATCH_SIZE,
    Batch,
    Encodings,
    Failures,
    OnError,
    Request,
    check_arguments,
    check_batch_size,
    check_images,
    drop_ended,
    portions,
    raise_failure,
    read_requests,
)
from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import hub, memory
from florence_onnx.bundles.bundle import Bundle, ImageSize
from florence_onnx.bundles.precisions import Precision
from florence_onnx.bundles.tokenizer import PromptTokenizer
from florence_onnx.detecting import absence
from florence_onnx.detecting.detections import Detections
from florence_onnx.errors import FlorenceError, InputError, ProviderError, TextInputError
from florence_onnx.generation.forced_search import ForcedSearch
from florence_onnx.generation.generate import new_search
from florence_onnx.generation.options import GenerationOptions, SearchConfig
from florence_onnx.generation.progress import Cancel, OnDeadline
from florence_onnx.generation.sampling import new_seed
from florence_onnx.generation.search import GeneratedSequence, Ids, Search, TeacherForcing, initial_tokens
from florence_onnx.generation.token_scores import TokenScorer
from florence_onnx.grammar import GrammarCompiler
from florence_onnx.images import decoding, opening
from florence_onnx.images.decoding import ImageInput
from florence_onnx.images.placement import Fit, check_fit
from florence_onnx.images.preprocessing import Preparation
from florence_onnx.inference import choosing
from florence_onnx.inference.answering import Answer, Answering, AnyImage, HostAnswering, raise_error, to_image
from florence_onnx.inference.decoder import TextBackend
from florence_onnx.inference.ending import Seen, source_image
from florence_onnx.inference.vision_encoders import VisionEncoders
from florence_onnx.limits import Limits, OnIndexedTokens, Seconds
from florence_onnx.loading import load, load_tokenizer, preferred_precisions
from florence_onnx.placing import Placed, count_image_tokens, parse_placed, place
from florence_onnx.prediction import EncodedImage, Prediction, with_choices, with_scores
from florence_onnx.prompts import to_task
from florence_onnx.runtime import memory_errors
from florence_onnx.runtime.engine import Engine
from florence_onnx.runtime.load_options import LoadOptions
from florence_onnx.runtime.providers import BF16, Options, Provider
from florence_onnx.runtime.sessions import CPU, SessionOptions
from florence_onnx.tasks import Task
from florence_onnx.tiling.tiles import Tiles

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from florence_onnx.inference.resident_model import ResidentModel
    from florence_onnx.parts import Part, PartReader
    from florence_onnx.run_arguments import DetectArguments, RunArguments
    from florence_onnx.streams import Call

R = TypeVar("R")
EXACT_PRECISIONS = ("fp32", "fp16")
"""Precisions of a vision encoder in which an image's features do not depend on the images beside it."""
_log = logging.getLogger("florence_onnx")


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
        self._grammars = GrammarCompiler(self._tokenizer, bundle.sizes.vocab_size, bundle.tasks)
        self._load_options: LoadOptions | None = None
        self._calibrations: dict[str, calibrations.Calibration] = {}
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
        precision: Precision | None = None,
        providers: Sequence[Provider] | None = None,
        provider_options: Options | None = None,
        session_options: SessionOptions | None = None,
        graph_cache: bool | str | os.PathLike[str] | None = None,
        max_batch: int | None = None,
        image_size: ImageSize | None = None,
        fit: Fit = "stretch",
        calibration: calibrations.CalibrationFiles | None = None,
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
                there is; of several, int8 on a CPU, fp16 with CUDA or TensorRT, fp32 with OpenVINO. In the layout of
                transformers.js also `"q8"` (files named `_quantized`), `"uint8"`, `"q4"`, `"q4f16"` and `"bnb4"`, or one
                for each module, as a dict such as `{"vision_encoder": "fp16", "decoder": "q4"}` or as
                `"vision_encoder=fp16,decoder=q4"`; there None, and modules that are not named, mean fp32.
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
            calibration: File of `florence-onnx evaluate --write-calibration`, or one a task: the `score` of boxes of that task
                is then the probability that they are right. See `florence_onnx.answers.calibration`.
            revision: Branch, tag or commit of a hub repository.
            cache_dir: Where downloads are kept, instead of the hub client's default.

        Raises:
            BundleError: The model is missing, damaged or of another format.
            InputError: The bundle has no vision encoder for `image_size`, or `precision` or another argument is malformed, or a
                calibration is damaged or was fitted for another model.
            ProviderError: The execution provider cannot run here.
            DeviceMemoryError: There is not enough memory, of the device or of the computer.
            MissingExtraError: No ONNX Runtime is installed.
        """
        files = "fp32" if precision == BF16 else precision
        with memory_errors.said_as_such(os.fspath(name)):
            preferred = preferred_precisions(device, providers) if files is None else bundles.PREFERRED_PRECISIONS
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
            calibration=calibrations.paths_of(calibration),
        )
        return cls.from_bundle(bundle, options)

    @classmethod
    def from_bundle(cls, bundle: Bundle, options: LoadOptions | None = None) -> Florence2:
        """Loads a model from a bundle that was read before; errors as for `from_pretrained`.

        Args:
            bundle: A bundle that `florence_onnx.bundles.bundle.read` or an export returned.
            options: The arguments of `from_pretrained` of the same names.
        """
        options = options or LoadOptions()
        found = calibrations.read_all(options.calibration, bundle.digest)
        with memory_errors.said_as_such(str(bundle.path), bundle.stages().values()):
            model = cls(*load(bundle, options))
        model._load_options, model._calibrations = options, found
        return model

    @property
    def tasks(self) -> dict[str, Task[Any]]:
        """All tasks of this model by slug: Florence-2's, then those that its bundle carries."""
        return {**tasks.TASKS, **self._bundle.tasks}

    # ------------------------------------------------------------------------------------------- copies and processes

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the bundle's description and the load options, a few kilobytes: the weights stay where they are on disk.

        Unpickling loads the model, on the same path; a process keeps the one that it has unpickled last, so that a pool
        to which the model is handed with each task loads it once a process.

        Raises:
            InputError: The model was composed by hand, so that there is nothing to load it from.
        """
        if self._load_options is None:
            raise InputError(
                "this model cannot be pickled: it was not loaded by from_pretrained or from_bundle; load it in each process"
            )
        return _load_pickled, (type(self), pickle.dumps((self._bundle, self._load_options)))

    def __copy__(self) -> Florence2:
        """The model itself: it has no state that a copy could change, and its sessions exist once a process."""
        return self

    def __deepcopy__(self, memo: Any) -> Florence2:
        """As `__copy__`."""
        return self

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes `(width, height)` in pixels at which the model can read images."""
        return self._bundle.image_sizes

    @property
    def digest(self) -> str | None:
        """SHA-256 of the model's files, in hexadecimal; None in the layout of transformers.js, which names no hashes."""
        return self._bundle.digest

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
        max_pixels: int = opening.MAX_PIXELS,
        max_side: int = opening.MAX_SIDE,
        max_bytes: int = decoding.MAX_BYTES,
        timeout: float = decoding.TIMEOUT,
        public_only: bool = False,
        allowed_hosts: Collection[str] = (),
        formats: Collection[str] = opening.FORMATS,
        copy: bool = True,
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
            max_side: Most pixels of width and of height to accept.
            max_bytes: Most bytes of a download or a `data:` URI.
            timeout: Seconds for a download, redirects included.
            public_only: For strings from untrusted callers: a string must be a URL and not a path, and must lead to the
                public internet, redirects included; proxies of the environment are not used.
            allowed_hosts: Exceptions to `public_only`: `HOST:PORT`, or `HOST` for its ports 80 and 443.
            formats: Formats to decode, by Pillow's names. Those beyond the default, such as `["ICO"]`, have no limits but
                pixels and sides: for files that you trust, not together with `public_only`.
            copy: Whether to copy a PIL image that is RGB and upright already, so that the caller may change theirs.

        Raises:
            ImageError: The image cannot be read.
            InputError: The model has no such image size, or `fit`, `allowed_hosts` or `formats` is malformed.
        """
        preparation = self._prepare(image_size, fit)
        loaded = decoding.load(
            image,
            apply_exif=apply_exif,
            max_pixels=max_pixels,
            max_side=max_side,
            max_bytes=max_bytes,
            timeout=timeout,
            public_only=public_only,
            allowed_hosts=allowed_hosts,
            formats=formats,
            copy=copy,
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
        check_images(images)
        listed = list(images)
        failures = Failures("raise", len(listed))
        found = self._answering.encode_all(listed, self._prepare(image_size, fit), failures.add)
        return [found[index] for index in range(len(listed))]

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
        config = self._resolve(options)
        ids, mask = self._check_input_ids(input_ids, attention_mask, len(images))
        counts = [each.num_image_tokens for each in images]
        self._check_lengths(mask, [f"row {row}" for row in range(len(images))], counts)
        answers = choosing.answer(
            self._answering,
            images,
            ids,
            mask,
            config,
            lambda rows, own: new_search(len(rows), own, None),
            self._prepare(None, None),
            raise_error,
        )
        return [answer[1] for answer in answers if answer is not None]

    @overload
    def run(
        self, task: Task[R], image: ImageInput | EncodedImage, **arguments: Unpack[RunArguments]
    ) -> Prediction[R]: ...

    @overload
    def run(
        self, task: str, image: ImageInput | EncodedImage, **arguments: Unpack[RunArguments]
    ) -> Prediction[Any]: ...

    def run(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        *,
        text_input: str | None = None,
        region: Region | str | None = None,
        tiles: Tiles | None = None,
        options: GenerationOptions | None = None,
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
        deadline: Seconds | None = None,
        cancel: Cancel | None = None,
        on_deadline: OnDeadline = "return",
    ) -> Prediction[Any]:
        """Runs one task on one image.

        Args:
            task: A constant of `florence_onnx.tasks`, its slug (`"object-detection"`) or its token (`"<OD>"`); also those of
                a task that the bundle carries, see `tasks`.
            image: An image that `encode` accepts, or one that it returned.
            text_input: Text, for the tasks that need one.
            region: Region in location bins, for the tasks that need one; see `Region.from_pixels`. Location tokens do as
                well: `"<loc_52><loc_332><loc_932><loc_774>"`.
            tiles: How to divide a large image, in which the model would miss small things; see `florence_onnx.tiling`. An
                image that fits into one tile is answered as without it.
            options: Generation options, which override the checkpoint's. With `num_return_sequences` the first answer is
                returned, and `Prediction.alternatives` has the others.
            image_size: Pixels at which the model reads the image, where it is not encoded already: one of `image_sizes`,
                `(width, height)` or the side of a square; None for the default of this model. Smaller is faster and sees
                less.
            fit: `"stretch"`, as transformers does, or `"pad"`, which keeps the aspect ratio with margins; None for the
                default of this model. Coordinates of results are those of the image in either case.
            deadline: Seconds from the call on after which the answer ends, within one decode step; `Prediction.truncated` is
                `"deadline"` then. Before the first token there is an empty answer: the vision encoder is not run where it has
                never been as quick as the time that is left. Reading the image is not cut short: a download has a limit of its
                own, see `encode`.
            cancel: Ends the answer when its `cancel` is called in another thread; `truncated` is `"cancelled"` then.
            on_deadline: `"return"` returns the answer as far as it goes, `"raise"` raises an error instead.

        Raises:
            InputError: The task, image, text, region or an option is wrong, or the task cannot be run on tiles.
            ProviderError: The device failed.
            DeadlineError: The deadline has passed, and `on_deadline` is `"raise"`.
            CancelledError: The call was cancelled, and `on_deadline` is `"raise"`.
        """
        shared: dict[str, Any] = {
            "options": options,
            "image_size": image_size,
            "fit": fit,
            "deadline": deadline,
            "cancel": cancel,
            "on_deadline": on_deadline,
        }
        if tiles is not None:
            from florence_onnx.tiling import asking as tiling  # takes time to import, and most callers do not need it

            return tiling.run(self, tasks.get(task, self._bundle.tasks), image, tiles, text_input, region, **shared)
        predictions: list[Prediction[Any]] = self.run_batch(
            [task], [image], text_inputs=[text_input], regions=[region], **shared
        )
        return predictions[0]

    def stream(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        **arguments: Unpack[RunArguments],
    ) -> Generator[Part | Prediction[Any], None, None]:
        """Runs one task on one image and yields its answer in parts, as they are generated.

        Text comes token by token, and each box, quad box, outline and word as soon as it is complete. With beams, a part comes
        when all beams agree on it. No part is ever taken back, and all together are exactly the answer. Therefore outlines come
        when the run of location tokens that they stand in has ended, unless it has `<poly>` tags; boxes of open-vocabulary
        detection come at the end, because a `<poly>` would turn them into outlines; and so do the results of a parser of one's own.

        The call runs in a thread of its own, from the first part on that is asked for. Closing the generator (`close`, or leaving
        the loop and dropping it) ends the call within one decode step.

        Args:
            task: As for `run`. With `num_return_sequences` the parts are those of the first answer.
            image: As for `run`.
            **arguments: As for `run`, except `tiles`: the answers about tiles are merged when all are there. Seconds of
                `deadline` count from the first part that is asked for.

        Yields:
            `TextPart` and `ItemPart` (of `florence_onnx.parts`), and last the `Prediction` that `run` returns.

        Raises:
            InputError: As `run`; for the task and its input at the call, for the rest at the first part.
            ProviderError: As `run`, or decoding had to start over, for want of memory, and gave another answer.
        """
        from florence_onnx import streams

        cancel = arguments.pop("cancel", None)
        call, reader = self._call(task, image, arguments)
        return streams.stream(call, reader, cancel)

    def astream(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        **arguments: Unpack[RunArguments],
    ) -> AsyncGenerator[Part | Prediction[Any], None]:
        """`stream` for asyncio: an asynchronous generator that never blocks the event loop."""
        from florence_onnx import streams

        cancel = arguments.pop("cancel", None)
        call, reader = self._call(task, image, arguments)
        return streams.astream(call, reader, cancel)

    async def arun(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        **arguments: Unpack[RunArguments],
    ) -> Prediction[Any]:
        """`run` for asyncio, in a thread of its own; cancelling the asyncio task ends the call within one decode step."""
        from florence_onnx import streams

        def call(abandon: Cancel) -> Prediction[Any]:
            arguments["cancel"] = abandon
            return self.run(tasks.get(task, self._bundle.tasks), image, **arguments)

        return await streams.arun(call, arguments.get("cancel"))

    def _call(
        self, task: Task[Any] | str, image: ImageInput | EncodedImage, arguments: RunArguments
    ) -> tuple[Call, PartReader]:
        """A call of `run` that waits to be made, and the reader of its parts.

        Raises:
            TypeError: `run` has no such argument.
        """
        from florence_onnx.run_arguments import RunArguments

        if unknown := arguments.keys() - RunArguments.__annotations__.keys():
            raise TypeError(f"stream() got an unexpected keyword argument {min(unknown)!r}")
        if arguments.pop("tiles", None) is not None:
            raise InputError("an answer about tiles has no parts, since tiles are merged at the end: use run or arun")
        found = tasks.get(task, self._bundle.tasks)
        text_input, region = arguments.pop("text_input", None), arguments.pop("region", None)
        found.format_input(text_input, region)  # a wrong input is an error now and not at the first part
        config = self._resolve(arguments.get("options"))
        if config.do_sample and config.seed is None:  # where decoding starts over it must draw the same
            arguments["options"] = replace(arguments.get("options") or GenerationOptions(), seed=new_seed())
        given: dict[str, Any] = {**arguments}

        def call(cancel: Cancel, on_tokens: OnIndexedTokens | None) -> Prediction[Any]:
            predictions: list[Prediction[Any]] = self.run_batch(
                [found],
                [image],
                text_inputs=[text_input],
                regions=[region],
                cancel=cancel,
                on_tokens=on_tokens,
                **given,
            )
            return predictions[0]

        return call, self.part_reader(found)

    def part_reader(self, task: Task[Any]) -> PartReader:
        """What makes parts of an answer's tokens, for those who follow it through `on_tokens` of `run_batch`."""
        from florence_onnx.parts import PartReader

        return PartReader(task, self._tokenizer.decode)

    def run_prompt(
        self,
        prompt: str,
        image: ImageInput | EncodedImage,
        *,
        parser: str | None = None,
        options: GenerationOptions | None = None,
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
    ) -> Prediction[Any]:
        """Runs a prompt of any wording on one image, as Microsoft's users write it.

        Args:
            prompt: The token of one of Florence-2's tasks, with its input behind it (`"<REGION_TO_OCR><loc_52>…"`), which
                becomes the task's sentence. Any other text is read as it is: `"<GENERATE_TAGS>"`, `"<DocVQA>What is …"`.
            image: As for `run`.
            parser: Reads the answer: a name of `florence_onnx.answers.postprocess.PARSERS`. None: the parser of the task
                whose token the prompt has; any other answer is text.
            options: As for `run`.
            image_size: As for `run`.
            fit: As for `run`; location tokens in the prompt are those of the image in either case.

        Raises:
            InputError: The prompt, the parser, the image or an option is wrong.
            ProviderError: The device failed.
        """
        return self.run(to_task(prompt, parser), image, options=options, image_size=image_size, fit=fit)

    @overload
    def run_batch(
        self,
        tasks: Task[Any] | str | Iterable[Task[Any] | str],
        images: Iterable[ImageInput | EncodedImage],
        *,
        text_inputs: Iterable[str | None] | None = None,
        regions: Iterable[Region | str | None] | None = None,
        options: GenerationOptions | None = None,
        batch_size: int | None = None,
        deadline: Seconds | Iterable[Seconds | None] | None = None,
        cancel: Cancel | Iterable[Cancel | None] | None = None,
        on_deadline: OnDeadline = "return",
        on_tokens: OnIndexedTokens | None = None,
        on_error: Literal["raise"] = "raise",
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
    ) -> list[Prediction[Any]]: ...

    @overload
    def run_batch(
        self,
        tasks: Task[Any] | str | Iterable[Task[Any] | str],
        images: Iterable[ImageInput | EncodedImage],
        *,
        text_inputs: Iterable[str | None] | None = None,
        regions: Iterable[Region | str | None] | None = None,
        options: GenerationOptions | None = None,
        batch_size: int | None = None,
        deadline: Seconds | Iterable[Seconds | None] | None = None,
        cancel: Cancel | Iterable[Cancel | None] | None = None,
        on_deadline: OnDeadline = "return",
        on_tokens: OnIndexedTokens | None = None,
        on_error: OnError,
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
    ) -> list[Prediction[Any] | FlorenceError]: ...

    def run_batch(
        self,
        tasks: Task[Any] | str | Iterable[Task[Any] | str],
        images: Iterable[ImageInput | EncodedImage],
        *,
        text_inputs: Iterable[str | None] | None = None,
        regions: Iterable[Region | str | None] | None = None,
        options: GenerationOptions | None = None,
        batch_size: int | None = None,
        deadline: Seconds | Iterable[Seconds | None] | None = None,
        cancel: Cancel | Iterable[Cancel | None] | None = None,
        on_deadline: OnDeadline = "return",
        on_tokens: OnIndexedTokens | None = None,
        on_error: OnError = "raise",
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
    ) -> Sequence[Prediction[Any] | FlorenceError]:
        """Runs any number of requests, some at a time, and returns all predictions.

        Every prediction is the one that `run` returns, with an exception: in int8 and int4 the text encoder quantizes
        activations with one scale for all requests that are decoded at once, so a prediction may depend on those.

        An image that occurs several times, as the same object or the same name, is encoded once; in an iterator, if it
        occurs again within `batch_size` images.

        Each prediction refers to its image, decoded, so that it can be drawn: what the list holds grows with the images'
        pixels. `run_each` yields predictions one by one, for callers that do not keep them.

        Args:
            tasks: One task for all images, or one per image.
            images: Images as for `run`, repeated where several tasks are run on one. An iterator is read no further than
                to the requests that are decoded next.
            text_inputs: One entry per image, None where the task takes no text.
            regions: One entry per image, None where the task takes no region.
            options: Generation options for all requests.
            batch_size: Most requests that are decoded at once, which bounds the memory. None is 8 on a CPU, where more
                are not faster, and four times `max_batch` with continuous batching.
            deadline: As for `run`, of all requests, or one entry per image; seconds count from the call on. A request that ends
                leaves the batch, and the others go on.
            cancel: As for `run`, for all requests, or one entry per image.
            on_deadline: As for `run`; the error is that of its request.
            on_tokens: Called after every decode step for each answer in flight, with the index of its image, its tokens so far
                from the decoder start token on, and the image, an `EncodedImage`. With beams these are the tokens with
                which every possible answer begins. It may be called in the thread that decodes for all callers, so it must be
                quick; what it raises ends its answer and is raised by this call.
            on_error: `"raise"`: the first error of a request ends the call. `"return"`: the error takes the place of the
                prediction, and all other requests are answered.
            image_size: As for `run`, for all images that are not encoded already; encoded ones may be of several sizes.
            fit: As for `run`.

        Returns:
            One prediction per image, in order.

        Raises:
            InputError: As for `run`, or the sequences differ in length. An error that concerns one image has `index`,
                from 0, and its message begins `image 17 of 64: ` for index 16.
            ProviderError: The device failed.
        """
        return list(
            self.run_each(
                tasks,
                images,
                text_inputs=text_inputs,
                regions=regions,
                options=options,
                batch_size=batch_size,
                deadline=deadline,
                cancel=cancel,
                on_deadline=on_deadline,
                on_tokens=on_tokens,
                on_error=on_error,
                image_size=image_size,
                fit=fit,
            )
        )

    def run_each(
        self,
        tasks: Task[Any] | str | Iterable[Task[Any] | str],
        images: Iterable[ImageInput | EncodedImage],
        *,
        text_inputs: Iterable[str | None] | None = None,
        regions: Iterable[Region | str | None] | None = None,
        options: GenerationOptions | None = None,
        batch_size: int | None = None,
        deadline: Seconds | Iterable[Seconds | None] | None = None,
        cancel: Cancel | Iterable[Cancel | None] | None = None,
        on_deadline: OnDeadline = "return",
        on_tokens: OnIndexedTokens | None = None,
        on_error: OnError = "raise",
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
    ) -> Iterator[Prediction[Any] | FlorenceError]:
        """As `run_batch`, but yields predictions in order while further images are not read yet, in flat memory.

        Raises:
            InputError: At the call for what can be told from the arguments, later for the rest; as `run_batch`.
            ProviderError: The device failed.
        """
        check_arguments(tasks, images, text_inputs, regions)
        check_batch_size(batch_size)
        failures = Failures(on_error, len(images) if isinstance(images, Sized) else None)
        config, preparation = self._resolve(options), self._prepare(image_size, fit)
        limits = Limits(deadline, cancel, on_deadline, on_tokens)
        requests: Iterable[Request] = read_requests(
            tasks, images, text_inputs, regions, failures, self._bundle.tasks, limits
        )
        known: list[Request] = []
        if failures.count is not None:  # wrong arguments then fail before any work is done
            requests = known = list(requests)
        default = DEVICE_BATCH_FACTOR * self.max_batch if self.max_batch else HOST_BATCH_SIZE
        batch = Batch(config, preparation, failures, Encodings(known))
        return self._run_portions(portions(requests, batch_size or default), batch)

    def _run_portions(
        self, portions: Iterable[list[Request]], batch: Batch
    ) -> Iterator[Prediction[Any] | FlorenceError]:
        failures, index = batch.failures, 0
        for portion in portions:
            found = self._run_portion(portion, batch)
            last = portion[-1].index
            while index <= last:
                yield found.pop(index) if index in found else failures.by_index.pop(index)
                index += 1
        while index in failures.by_index:
            yield failures.by_index.pop(index)
            index += 1

    def _run_portion(self, portion: Sequence[Request], batch: Batch) -> dict[int, Prediction[Any]]:
        """The predictions by the requests' indices, without those that failed."""
        pairs = self._drop_long([(request, batch.encodings.find(request.image)) for request in portion], batch)
        pairs = place(pairs, batch.preparation, self._answering.encode_all, batch.failures.add)
        requests, images = [request for request, _ in pairs], [image for _, image in pairs]
        if not requests:
            return {}
        input_ids, attention_mask = self._tokenizer.encode([request.prompt for request in requests])
        # Encoded without its prompt: there the text follows a space, which byte-level BPE makes part of the first
        # token, and an answer that repeats the text has no space there.
        lookup_ids = [self._tokenizer.encode_text(request.formatted_input) for request in requests]
        counts = self._count_image_tokens(images, batch.preparation)
        encoder_ids = self._encoder_ids(input_ids, attention_mask, counts)

        progress = [request.progress for request in requests]

        def make_search(rows: Sequence[int], own: SearchConfig) -> Search:
            follow = [progress[row] for row in rows]
            return new_search(
                len(rows), own, [lookup_ids[row] for row in rows], [encoder_ids[row] for row in rows], follow
            )

        def failed(rows: Sequence[int], error: FlorenceError) -> None:
            batch.failures.add([requests[row].index for row in rows], error)

        try:
            answers = choosing.answer(
                self._answering,
                images,
                input_ids,
                attention_mask,
                batch.config,
                make_search,
                batch.preparation,
                failed,
                progress,
            )
        except ProviderError as error:
            if not batch.failures.are_kept:
                raise
            return self._run_alone(requests, error, batch)
        batch.encodings.keep(requests, [answer and answer[0] for answer in answers])
        raise_failure(progress)
        drop_ended(requests, answers, batch.failures)
        return self._make_predictions(requests, answers, batch.failures)

    def _make_predictions(
        self, requests: Sequence[Request], answers: Sequence[Answer | None], failures: Failures
    ) -> dict[int, Prediction[Any]]:
        predictions = {}
        for request, answer in zip(requests, answers, strict=True):
            if answer is None:
                continue
            try:
                predictions[request.index] = self._make_prediction(request.task, *answer)
            except InputError as error:
                failures.add([request.index], error)
        return predictions

    def _run_alone(self, requests: Sequence[Request], error: ProviderError, batch: Batch) -> dict[int, Prediction[Any]]:
        """Runs requests one by one that have failed together, to find out whose error it is."""
        if len(requests) == 1:
            batch.failures.add([requests[0].index], error)
            return {}
        alone = [self._run_portion([request], batch) for request in requests]
        return {index: prediction for each in alone for index, prediction in each.items()}

    def _drop_long(self, pairs: Sequence[Placed], batch: Batch) -> list[Placed]:
        """The requests, with their images, whose prompts fit into the model."""
        counts = self._count_image_tokens([image for _, image in pairs], batch.preparation)
        fitting = []
        for pair, count in zip(pairs, counts, strict=True):
            request = pair[0]
            try:
                self.check_prompt_bytes(len(request.prompt.encode()))
                self._check_lengths(self._tokenizer.encode([request.prompt])[1], [request.task.slug], [count])
                fitting.append(pair)
            except TextInputError as error:
                batch.failures.add([request.index], error)
        return fitting

    def detect(
        self,
        image: ImageInput | EncodedImage,
        classes: Sequence[str],
        *,
        task: Task[Any] | str = "open-vocabulary-detection",
        min_score: float = 0.0,
        nms: float | None = 0.5,
        absent: absence.Absent = absence.DEFAULT_RULE,
        threshold: float | None = None,
        tiles: Tiles | None = None,
        options: GenerationOptions | None = None,
        deadline: Seconds | None = None,
        cancel: Cancel | None = None,
        on_deadline: OnDeadline = "return",
    ) -> Detections:
        """Finds the objects of a list of classes: the image is encoded once, and each class is a prompt of its own.

        Args:
            image: As for `run`.
            classes: What to look for, such as `["car", "a red kite"]`; white space around a name is removed, and a name that
                occurs twice counts once. A name may be a phrase: it is not taken apart at "and".
            task: A task that takes text and answers with boxes.
            min_score: Boxes with a lower `score` are dropped.
            nms: Of two boxes of one class whose intersection over union is greater than this, the one with the lower score
                is dropped; None keeps all.
            absent: Published checkpoints answer a class that is not in the image too, often with a box of the whole image.
                Which boxes are dropped for that: those whose score is low ("score"), those that cover nearly the whole image
                ("area"), those that are hardly less probable for a blank image ("contrast"), those that the model would not
                call so ("likelihood"), or none ("off"). See `florence_onnx.detecting.absence`.
            threshold: Boxes whose value by that rule is below it are dropped; None for `absence.THRESHOLDS`. Fit your own on
                images whose contents you know, with `absence.fit_threshold`.
            tiles: As for `run`.
            options: As for `run`.
            deadline: As for `run`. A class whose answer was ended has the boxes that were complete, and none are dropped by
                the rule for absent classes; `Detections.truncated` is the reason then.
            cancel: As for `run`.
            on_deadline: As for `run`.

        Raises:
            InputError: The classes, the task or another argument is wrong.
            ProviderError: The device failed.
            DeadlineError: As for `run`.
            CancelledError: As for `run`.
        """
        from florence_onnx.detecting import asking as detecting  # as for `tiling`

        selection = detecting.Selection(min_score, nms, absent, threshold)
        found = tasks.get(task, self._bundle.tasks)
        limits = Limits(deadline, cancel, on_deadline)
        return detecting.detect(self, image, classes, found, selection, tiles, options, limits)

    async def adetect(
        self, image: ImageInput | EncodedImage, classes: Sequence[str], **arguments: Unpack[DetectArguments]
    ) -> Detections:
        """`detect` for asyncio, in a thread of its own; cancelling the asyncio task ends the call within one decode step."""
        from florence_onnx import streams

        def call(abandon: Cancel) -> Detections:
            arguments["cancel"] = abandon
            return self.detect(image, classes, **arguments)

        return await streams.arun(call, arguments.get("cancel"))

    def score_answers(
        self,
        task: Task[Any] | str,
        images: Sequence[ImageInput | EncodedImage],
        answers: Sequence[str | Sequence[int]],
        *,
        text_inputs: Sequence[str | None] | None = None,
        regions: Sequence[Region | str | None] | None = None,
    ) -> list[Prediction[Any]]:
        """Computes how probable the model finds given answers.

        Args:
            task: As for `run`.
            images: One an answer.
            answers: Token ids from the decoder start token on, such as `Prediction.token_ids`, or the text that an answer
                begins with.
            text_inputs: One an answer.
            regions: One an answer.

        Returns:
            The answers as predictions with scores.

        Raises:
            InputError: As for `run_batch`, or an answer is empty, too long, or has a token outside the vocabulary.
            ProviderError: The device failed.
        """
        check_arguments(task, images, text_inputs, regions)
        config = self._resolve(GenerationOptions(scores=True))
        given = initial_tokens(config)
        ids = [given + self._tokenizer.encode_text(each) if isinstance(each, str) else list(each) for each in answers]
        if len(ids) != len(images) or any(len(each) <= len(given) for each in ids):
            raise InputError(
                f"give one answer an image, each longer than its {len(given)} given tokens: {len(images)} images"
            )
        for each in ids:
            self._check_tokens(each)
        requests = list(
            read_requests(task, images, text_inputs, regions, Failures("raise", len(images)), self._bundle.tasks)
        )
        scorer = TokenScorer(config.location_ids)
        encodings = Encodings(requests)
        predictions: list[Prediction[Any]] = []
        for portion in portions(requests, HOST_BATCH_SIZE):
            predictions += self._score_portion(
                portion, [ids[each.index] for each in portion], len(given), scorer, encodings
            )
        return predictions

    def _score_portion(
        self,
        portion: list[Request],
        answers: list[list[int]],
        num_given: int,
        scorer: TokenScorer,
        encodings: Encodings,
    ) -> list[Prediction[Any]]:
        preparation = self._prepare(None, None)
        pairs = [(request, encodings.find(request.image)) for request in portion]
        placed = place(pairs, preparation, self._answering.encode_all, raise_error)
        images = [image for _, image in placed]
        for request, _ in placed:
            self.check_prompt_bytes(len(request.prompt.encode()))
        input_ids, attention_mask = self._tokenizer.encode([request.prompt for request, _ in placed])
        counts = self._count_image_tokens(images, preparation)
        self._check_lengths(attention_mask, [request.task.slug for request, _ in placed], counts)
        found = self._answering.answer(
            images,
            input_ids,
            attention_mask,
            lambda rows: ForcedSearch([answers[row] for row in rows], num_given, scorer),
            preparation,
            raise_error,
        )
        encodings.keep(portion, [each and each[0] for each in found])
        return [
            self._make_prediction(request.task, *each)
            for request, each in zip(portion, found, strict=True)
            if each is not None
        ]

    def check_options(self, options: GenerationOptions | None) -> None:
        """Checks generation options without running anything.

        Args:
            options: As for `run`.

        Raises:
            OptionsError: They are not possible with this model on its device.
        """
        self._resolve(options)

    @property
    def max_prompt_bytes(self) -> int:
        """Most UTF-8 bytes of a prompt: as many of the longest token as there is room for beside the image tokens.

        Blanks before a `<mask>` token, which belong to it however many they are, are not considered.
        """
        return self._num_prompt_tokens * self._tokenizer.max_token_bytes

    def check_prompt_bytes(self, num_bytes: int) -> None:
        """Checks whether a text can be short enough for a prompt, without tokenizing it.

        Most texts that pass are still too long: the exact limit is in tokens, and `run` checks it.

        Args:
            num_bytes: UTF-8 bytes of the text.

        Raises:
            TextInputError: No text of that length fits.
        """
        if num_bytes > self._num_prompt_tokens and num_bytes > self.max_prompt_bytes:
            raise TextInputError(
                f"the text has {num_bytes:,} bytes; this model has room for {self._num_prompt_tokens} tokens beside "
                f"{min(self._bundle.all_num_image_tokens)} image tokens, which are {self.max_prompt_bytes:,} bytes at the "
                "very most: shorten text_input"
            )

    def score_tokens(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        token_ids: Sequence[int],
        *,
        text_input: str | None = None,
        region: Region | str | None = None,
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
        found = read_requests(task, [image], [text_input], [region], Failures("raise", 1), self._bundle.tasks)
        ((request, image),) = place(
            [(each, image) for each in found], preparation, self._answering.encode_all, raise_error
        )
        self._check_tokens(token_ids)
        self.check_prompt_bytes(len(request.prompt.encode()))
        input_ids, attention_mask = self._tokenizer.encode([request.prompt])
        self._check_lengths(attention_mask, [request.task.slug], self._count_image_tokens([image], preparation))
        logits = np.empty((len(token_ids) - 1, self._bundle.sizes.vocab_size), dtype=np.float32)
        if len(logits):  # nothing follows the last token
            self._answering.answer(
                [image],
                input_ids,
                attention_mask,
                lambda _: TeacherForcing(token_ids, logits),
                preparation,
                raise_error,
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
            "tasks": list(bundle.tasks),
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

    def _count_image_tokens(self, images: Sequence[AnyImage], preparation: Preparation) -> list[int]:
        return [count_image_tokens(self._bundle, image, preparation) for image in images]

    @property
    def _num_prompt_tokens(self) -> int:
        """Most tokens of a prompt, beside the smallest image that the model can read."""
        return self._bundle.sizes.max_positions - min(self._bundle.all_num_image_tokens)

    def _check_lengths(self, attention_mask: Ids, names: Sequence[str], counts: Sequence[int]) -> None:
        lengths = attention_mask.sum(axis=1)
        for name, length, count in zip(names, lengths, counts, strict=True):
            room = self._bundle.sizes.max_positions - count
            if length > room:
                raise TextInputError(
                    f"the prompt of {name} has {length} tokens; this model has room for {room} "
                    f"beside {count} image tokens: shorten text_input"
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

    def _make_prediction(self, task: Task[Any], seen: Seen, sequence: GeneratedSequence) -> Prediction[Any]:
        text = self._tokenizer.decode(sequence.token_ids)
        results = parse_placed(task, text, seen)
        others = tuple(self._make_prediction(task, seen, other) for other in sequence.alternatives)
        image = source_image(seen)
        prediction = Prediction(results, task, text, sequence.token_ids, sequence.truncated, image, others)
        if sequence.choices:
            prediction = with_choices(prediction, sequence.choices, self._tokenizer.decode)
        if sequence.scores is None:
            return prediction
        tokenizer = self._tokenizer
        calibration = self._calibrations.get(task.slug)
        return with_scores(
            prediction, sequence.scores, tokenizer.decode, tokenizer.token_text, tokenizer.location_ids, calibration
        )

    def _resolve(self, options: GenerationOptions | None) -> SearchConfig:
        config = self._bundle.generation.resolve(options)
        if config.constrain is not None:
            config = replace(config, constrain=self._grammars.compile(config))
        self._answering.check(config)
        return replace(config, location_ids=self._tokenizer.location_ids) if config.scores else config


@lru_cache(maxsize=1)
def _load_pickled(model: type[Florence2], content: bytes) -> Florence2:
    """Loads what `Florence2.__reduce__` has written: a bundle and its load options."""
    return model.from_bundle(*pickle.loads(content))
