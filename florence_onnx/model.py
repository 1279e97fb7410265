"""`Florence2`: composes the stages. Every request starts and ends here:

```text
tasks, images, text_inputs, regions ─read_requests─▶ Request ─portions─▶ P requests at a time
prompts ─PromptTokenizer.encode─▶ input_ids (P, T), attention_mask (P, T)
images, input_ids, attention_mask ─Answering.answer─▶ EncodedImage, GeneratedSequence
GeneratedSequence ─PromptTokenizer.decode─▶ text ─tasks.parse─▶ results ─▶ Prediction
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
from florence_onnx.answers.locations import Region
from florence_onnx.batches import (
    DEVICE_BATCH_FACTOR,
    HOST_BATCH_SIZE,
    Encodings,
    Failures,
    OnError,
    Request,
    check_arguments,
    check_batch_size,
    drop_ended,
    portions,
    raise_failure,
    read_requests,
)
from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import hub, memory
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.bundles.precisions import Precision
from florence_onnx.bundles.tokenizer import PromptTokenizer
from florence_onnx.errors import FlorenceError, InputError, ProviderError, TextInputError
from florence_onnx.generation.generate import new_search
from florence_onnx.generation.options import GenerationOptions, SearchConfig
from florence_onnx.generation.progress import Cancel, OnDeadline
from florence_onnx.generation.sampling import new_seed
from florence_onnx.generation.search import GeneratedSequence, Ids, Search, TeacherForcing
from florence_onnx.images import decoding, opening
from florence_onnx.images.decoding import ImageInput
from florence_onnx.inference.answering import Answering, HostAnswering, raise_error, source_image, to_image
from florence_onnx.inference.decoder import TextBackend
from florence_onnx.limits import Limits, OnIndexedTokens, Seconds
from florence_onnx.loading import load, load_tokenizer, preferred_precisions
from florence_onnx.prediction import EncodedImage, Prediction, with_scores
from florence_onnx.prompts import to_task
from florence_onnx.runtime import memory_errors
from florence_onnx.runtime.engine import Engine
from florence_onnx.runtime.load_options import LoadOptions
from florence_onnx.runtime.providers import BF16, Options, Provider
from florence_onnx.runtime.sessions import SessionOptions
from florence_onnx.tasks import Task, parse

if TYPE_CHECKING:
    from florence_onnx.inference.resident_model import ResidentModel
    from florence_onnx.parts import Part, PartReader
    from florence_onnx.streams import Call

R = TypeVar("R")
_log = logging.getLogger("florence_onnx")


class Florence2:
    """A Florence-2 model on ONNX Runtime. All methods may be called from several threads at once."""

    def __init__(
        self,
        bundle: Bundle,
        vision_encoder: Engine,
        text_model: TextBackend,
        provider: str,
        precision: str | None = None,
        tokenizer: PromptTokenizer | None = None,
        resident: ResidentModel | None = None,
    ) -> None:
        """Composes stages that are loaded already; call `from_pretrained` or `from_bundle` instead."""
        self._bundle = bundle
        self._vision_encoder = vision_encoder
        self._text_model = text_model
        self._provider = provider
        self._precision = precision or bundle.precision
        self._tokenizer = tokenizer or load_tokenizer(bundle)
        self._resident = resident
        self._load_options: LoadOptions | None = None
        if resident is None:
            self._answering: Answering = HostAnswering(bundle.sizes, vision_encoder, text_model)
        else:
            # takes time to import, and a CPU does not need it
            from florence_onnx.inference.device_answering import DeviceAnswering

            self._answering = DeviceAnswering(bundle.sizes, resident)

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
            revision: Branch, tag or commit of a hub repository.
            cache_dir: Where downloads are kept, instead of the hub client's default.

        Raises:
            BundleError: The model is missing, damaged or of another format.
            InputError: `precision` or another argument is malformed.
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
        with memory_errors.said_as_such(str(bundle.path), bundle.stages().values()):
            model = cls(*load(bundle, options))
        model._load_options = options
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
    def max_batch(self) -> int:
        """Most prompts in flight, those of all threads together; 0 where each call is decoded by itself."""
        return 0 if self._resident is None else self._resident.max_batch

    # ------------------------------------------------------------------------------------------------------ requests

    def encode(
        self,
        image: ImageInput,
        *,
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
            InputError: `allowed_hosts` or `formats` is malformed.
        """
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
        return self._answering.encode(loaded)

    def encode_pixels(self, pixel_values: npt.NDArray[np.float32]) -> list[EncodedImage]:
        """Runs the vision encoder on images that were preprocessed elsewhere, such as by transformers' processor.

        Args:
            pixel_values: `(B, 3, H, W)` float32, normalised, of the size that the model reads.

        Returns:
            B images; their `source_image` is what the pixels show, at the model's size.

        Raises:
            InputError: `pixel_values` has another shape.
            ProviderError: The device failed.
        """
        sizes = self._bundle.sizes
        width, height = sizes.image_size
        values = np.asarray(pixel_values, dtype=np.float32)
        if values.ndim != 4 or values.shape[1:] != (3, height, width):
            raise InputError(
                f"pixel_values must be (B, 3, {height}, {width}) for this model, got {values.shape}; preprocess images "
                f"to {width} x {height}"
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
        self._check_lengths(mask, [f"row {row}" for row in range(len(images))])
        answers = self._answering.answer(
            images, ids, mask, lambda indices: new_search(len(indices), config, None), raise_error
        )
        return [answer[1] for answer in answers if answer is not None]

    @overload
    def run(
        self,
        task: Task[R],
        image: ImageInput | EncodedImage,
        *,
        text_input: str | None = None,
        region: Region | str | None = None,
        options: GenerationOptions | None = None,
        deadline: Seconds | None = None,
        cancel: Cancel | None = None,
        on_deadline: OnDeadline = "return",
    ) -> Prediction[R]: ...

    @overload
    def run(
        self,
        task: str,
        image: ImageInput | EncodedImage,
        *,
        text_input: str | None = None,
        region: Region | str | None = None,
        options: GenerationOptions | None = None,
        deadline: Seconds | None = None,
        cancel: Cancel | None = None,
        on_deadline: OnDeadline = "return",
    ) -> Prediction[Any]: ...

    def run(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        *,
        text_input: str | None = None,
        region: Region | str | None = None,
        options: GenerationOptions | None = None,
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
            options: Generation options, which override the checkpoint's. With `num_return_sequences` the first answer is
                returned, and `Prediction.alternatives` has the others.
            deadline: Seconds from the call on after which the answer ends, within one decode step; `Prediction.truncated` is
                `"deadline"` then. Before the first token there is an empty answer: the vision encoder is not run where it has
                never been as quick as the time that is left. Reading the image is not cut short: a download has a limit of its
                own, see `encode`.
            cancel: Ends the answer when its `cancel` is called in another thread; `truncated` is `"cancelled"` then.
            on_deadline: `"return"` returns the answer as far as it goes, `"raise"` raises an error instead.

        Raises:
            InputError: The task, image, text, region or an option is wrong.
            ProviderError: The device failed.
            DeadlineError: The deadline has passed, and `on_deadline` is `"raise"`.
            CancelledError: The call was cancelled, and `on_deadline` is `"raise"`.
        """
        return self.run_batch(
            [task],
            [image],
            text_inputs=[text_input],
            regions=[region],
            options=options,
            deadline=deadline,
            cancel=cancel,
            on_deadline=on_deadline,
        )[0]

    def stream(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        *,
        text_input: str | None = None,
        region: Region | str | None = None,
        options: GenerationOptions | None = None,
        deadline: Seconds | None = None,
        cancel: Cancel | None = None,
        on_deadline: OnDeadline = "return",
    ) -> Generator[Part | Prediction[Any], None, None]:
        """Runs one task on one image and yields its answer in parts, as they are generated.

        Text comes token by token, and each box, quad box, outline and word as soon as it is complete. With beams, a part comes
        when all beams agree on it. No part is ever taken back, and all together are exactly the answer. Therefore outlines come
        when the run of location tokens that they stand in has ended, unless it has `<poly>` tags; boxes of open-vocabulary
        detection come at the end, because a `<poly>` would turn them into outlines; and so do the results of a parser of one's own.

        The call runs in a thread of its own, from the first part on that is asked for. Closing the generator (`close`, or leaving
        the loop and dropping it) ends the call within one decode step.

        Args:
            task: As for `run`, like all other arguments. With `num_return_sequences` the parts are those of the first answer.
            image: See `task`.
            text_input: See `task`.
            region: See `task`.
            options: See `task`.
            deadline: See `task`; seconds count from the first part that is asked for.
            cancel: See `task`.
            on_deadline: See `task`.

        Yields:
            `TextPart` and `ItemPart` (of `florence_onnx.parts`), and last the `Prediction` that `run` returns.

        Raises:
            InputError: As `run`; for the task and its input at the call, for the rest at the first part.
            ProviderError: As `run`, or decoding had to start over, for want of memory, and gave another answer.
        """
        from florence_onnx import streams

        call, reader = self._call(task, image, text_input, region, options, deadline, on_deadline)
        return streams.stream(call, reader, cancel)

    def astream(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        *,
        text_input: str | None = None,
        region: Region | str | None = None,
        options: GenerationOptions | None = None,
        deadline: Seconds | None = None,
        cancel: Cancel | None = None,
        on_deadline: OnDeadline = "return",
    ) -> AsyncGenerator[Part | Prediction[Any], None]:
        """`stream` for asyncio: an asynchronous generator that never blocks the event loop."""
        from florence_onnx import streams

        call, reader = self._call(task, image, text_input, region, options, deadline, on_deadline)
        return streams.astream(call, reader, cancel)

    async def arun(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        *,
        text_input: str | None = None,
        region: Region | str | None = None,
        options: GenerationOptions | None = None,
        deadline: Seconds | None = None,
        cancel: Cancel | None = None,
        on_deadline: OnDeadline = "return",
    ) -> Prediction[Any]:
        """`run` for asyncio, in a thread of its own; cancelling the asyncio task ends the call within one decode step."""
        from florence_onnx import streams

        call, _ = self._call(task, image, text_input, region, options, deadline, on_deadline)
        return await streams.arun(call, cancel)

    def _call(
        self,
        task: Task[Any] | str,
        image: ImageInput | EncodedImage,
        text_input: str | None,
        region: Region | str | None,
        options: GenerationOptions | None,
        deadline: Seconds | None,
        on_deadline: OnDeadline,
    ) -> tuple[Call, PartReader]:
        """A call of `run` that waits to be made, and the reader of its parts."""
        found = tasks.get(task, self._bundle.tasks)
        found.format_input(text_input, region)  # a wrong input is an error now and not at the first part
        config = self._resolve(options)
        if config.do_sample and config.seed is None:  # where decoding starts over it must draw the same
            options = replace(options or GenerationOptions(), seed=new_seed())

        def call(cancel: Cancel, on_tokens: OnIndexedTokens | None) -> Prediction[Any]:
            (prediction,) = self.run_batch(
                [found],
                [image],
                text_inputs=[text_input],
                regions=[region],
                options=options,
                deadline=deadline,
                cancel=cancel,
                on_deadline=on_deadline,
                on_tokens=on_tokens,
            )
            return prediction

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
    ) -> Prediction[Any]:
        """Runs a prompt of any wording on one image, as Microsoft's users write it.

        Args:
            prompt: The token of one of Florence-2's tasks, with its input behind it (`"<REGION_TO_OCR><loc_52>…"`), which
                becomes the task's sentence. Any other text is read as it is: `"<GENERATE_TAGS>"`, `"<DocVQA>What is …"`.
            image: As for `run`.
            parser: Reads the answer: a name of `florence_onnx.answers.postprocess.PARSERS`. None: the parser of the task
                whose token the prompt has; any other answer is text.
            options: As for `run`.

        Raises:
            InputError: The prompt, the parser, the image or an option is wrong.
            ProviderError: The device failed.
        """
        return self.run(to_task(prompt, parser), image, options=options)

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
                from the decoder start token on, and the image's `(width, height)` in pixels. With beams these are the tokens with
                which every possible answer begins. It may be called in the thread that decodes for all callers, so it must be
                quick; what it raises ends its answer and is raised by this call.
            on_error: `"raise"`: the first error of a request ends the call. `"return"`: the error takes the place of the
                prediction, and all other requests are answered.

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
    ) -> Iterator[Prediction[Any] | FlorenceError]:
        """As `run_batch`, but yields predictions in order while further images are not read yet, in flat memory.

        Raises:
            InputError: At the call for what can be told from the arguments, later for the rest; as `run_batch`.
            ProviderError: The device failed.
        """
        check_arguments(tasks, images, text_inputs, regions)
        check_batch_size(batch_size)
        failures = Failures(on_error, len(images) if isinstance(images, Sized) else None)
        config = self._resolve(options)
        limits = Limits(deadline, cancel, on_deadline, on_tokens)
        requests: Iterable[Request] = read_requests(
            tasks, images, text_inputs, regions, failures, self._bundle.tasks, limits
        )
        known: list[Request] = []
        if failures.count is not None:  # wrong arguments then fail before any work is done
            requests = known = list(requests)
        default = DEVICE_BATCH_FACTOR * self.max_batch if self.max_batch else HOST_BATCH_SIZE
        return self._run_portions(portions(requests, batch_size or default), config, failures, Encodings(known))

    def _run_portions(
        self, portions: Iterable[list[Request]], config: SearchConfig, failures: Failures, encodings: Encodings
    ) -> Iterator[Prediction[Any] | FlorenceError]:
        index = 0
        for portion in portions:
            found = self._run_portion(portion, config, failures, encodings)
            last = portion[-1].index
            while index <= last:
                yield found.pop(index) if index in found else failures.by_index.pop(index)
                index += 1
        while index in failures.by_index:
            yield failures.by_index.pop(index)
            index += 1

    def _run_portion(
        self, portion: list[Request], config: SearchConfig, failures: Failures, encodings: Encodings
    ) -> dict[int, Prediction[Any]]:
        """The predictions by the requests' indices, without those that failed."""
        requests = self._drop_long(portion, failures)
        if not requests:
            return {}
        input_ids, attention_mask = self._tokenizer.encode([request.prompt for request in requests])
        # Encoded without its prompt: there the text follows a space, which byte-level BPE makes part of the first
        # token, and an answer that repeats the text has no space there.
        lookup_ids = [self._tokenizer.encode_text(request.formatted_input) for request in requests]
        encoder_ids = self._encoder_ids(input_ids, attention_mask)

        def make_search(rows: Sequence[int]) -> Search:
            follow = [progress[row] for row in rows]
            return new_search(
                len(rows), config, [lookup_ids[row] for row in rows], [encoder_ids[row] for row in rows], follow
            )

        def failed(rows: Sequence[int], error: FlorenceError) -> None:
            failures.add([requests[row].index for row in rows], error)

        images = [encodings.find(request.image) for request in requests]
        progress = [request.progress for request in requests]
        try:
            answers = self._answering.answer(images, input_ids, attention_mask, make_search, failed, progress)
        except ProviderError as error:
            if not failures.are_kept:
                raise
            return self._run_alone(requests, error, config, failures, encodings)
        encodings.keep(requests, [answer[0] if answer else None for answer in answers])
        raise_failure(progress)
        drop_ended(requests, answers, failures)
        return {
            request.index: self._make_prediction(request.task, source_image(answer[0]), answer[1])
            for request, answer in zip(requests, answers, strict=True)
            if answer is not None
        }

    def _run_alone(
        self,
        requests: Sequence[Request],
        error: ProviderError,
        config: SearchConfig,
        failures: Failures,
        encodings: Encodings,
    ) -> dict[int, Prediction[Any]]:
        """Runs requests one by one that have failed together, to find out whose error it is."""
        if len(requests) == 1:
            failures.add([requests[0].index], error)
            return {}
        alone = [self._run_portion([request], config, failures, encodings) for request in requests]
        return {index: prediction for each in alone for index, prediction in each.items()}

    def _drop_long(self, requests: Sequence[Request], failures: Failures) -> list[Request]:
        """The requests whose prompts fit into the model."""
        fitting = []
        for request in requests:
            try:
                self.check_prompt_bytes(len(request.prompt.encode()))
                self._check_lengths(self._tokenizer.encode([request.prompt])[1], [request.task.slug])
                fitting.append(request)
            except TextInputError as error:
                failures.add([request.index], error)
        return fitting

    def check_options(self, options: GenerationOptions | None) -> None:
        """Checks generation options without running anything.

        Args:
            options: As for `run`.

        Raises:
            OptionsError: They are not possible with this model on its device.
        """
        self._answering.check(self._bundle.generation.resolve(options))

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
                f"{self._bundle.sizes.num_image_tokens} image tokens, which are {self.max_prompt_bytes:,} bytes at the "
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
        (request,) = read_requests(task, [image], [text_input], [region], Failures("raise", 1), self._bundle.tasks)
        self._check_tokens(token_ids)
        self.check_prompt_bytes(len(request.prompt.encode()))
        input_ids, attention_mask = self._tokenizer.encode([request.prompt])
        self._check_lengths(attention_mask, [request.task.slug])
        logits = np.empty((len(token_ids) - 1, self._bundle.sizes.vocab_size), dtype=np.float32)
        if len(logits):  # nothing follows the last token
            self._answering.answer(
                [image], input_ids, attention_mask, lambda _: TeacherForcing(token_ids, logits), raise_error
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
            "generation": vars(bundle.generation.resolve(None)),
            "tasks": list(bundle.tasks),
            "source": dict(bundle.source),
            "verification": dict(bundle.verification),
            "device_memory": memory.table(bundle),
        }

    # --------------------------------------------------------------------------------- between requests and stages

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        sizes = self._bundle.sizes
        if not 1 <= len(token_ids) <= sizes.max_positions + 1:
            raise InputError(f"token_ids must be 1 to {sizes.max_positions + 1} tokens, got {len(token_ids)}")
        if not all(0 <= token < sizes.vocab_size for token in token_ids):
            raise InputError(f"token_ids must be from 0 to {sizes.vocab_size - 1}, got {tuple(token_ids)!r}")

    @property
    def _num_prompt_tokens(self) -> int:
        return self._bundle.sizes.max_positions - self._bundle.sizes.num_image_tokens

    def _check_lengths(self, attention_mask: Ids, names: Sequence[str]) -> None:
        num_image_tokens, room = self._bundle.sizes.num_image_tokens, self._num_prompt_tokens
        for name, length in zip(names, attention_mask.sum(axis=1), strict=True):
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

    def _encoder_ids(self, input_ids: Ids, attention_mask: Ids) -> list[list[int]]:
        """What `generate` takes for the text encoder's tokens: image tokens, then the prompt without padding."""
        image_token = self._tokenizer.image_token_id
        image = [] if image_token is None else [image_token] * self._bundle.sizes.num_image_tokens
        return [image + row[mask == 1].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]

    def _make_prediction(self, task: Task[Any], image: PILImage.Image, sequence: GeneratedSequence) -> Prediction[Any]:
        text = self._tokenizer.decode(sequence.token_ids)
        results = parse(task, text, image.size)
        others = tuple(self._make_prediction(task, image, other) for other in sequence.alternatives)
        prediction = Prediction(results, task, text, sequence.token_ids, sequence.truncated, image, others)
        if sequence.scores is None:
            return prediction
        return with_scores(prediction, sequence.scores, self._tokenizer.decode, self._tokenizer.location_ids)

    def _resolve(self, options: GenerationOptions | None) -> SearchConfig:
        config = self._bundle.generation.resolve(options)
        self._answering.check(config)
        return replace(config, location_ids=self._tokenizer.location_ids) if config.scores else config


@lru_cache(maxsize=1)
def _load_pickled(model: type[Florence2], content: bytes) -> Florence2:
    """Loads what `Florence2.__reduce__` has written: a bundle and its load options."""
    return model.from_bundle(*pickle.loads(content))
