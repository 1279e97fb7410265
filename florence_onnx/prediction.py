"""What a model returns: an encoded image, and a prediction."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from florence_onnx.answers.calibration import Calibration
from florence_onnx.answers.results import Image, TextScore, to_dict
from florence_onnx.errors import InputError
from florence_onnx.generation.progress import Truncated
from florence_onnx.generation.token_scores import TokenScores
from florence_onnx.images.placement import Placement
from florence_onnx.runtime.device_memory import DeviceArray
from florence_onnx.tasks import DENSE_REGION_CAPTION, OBJECT_DETECTION, Task

if TYPE_CHECKING:
    from supervision import Detections

    from florence_onnx.forms.labelled import LabelledImage

R = TypeVar("R")


def encode_png(image: PILImage.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    # level 1 compresses three times as fast as Pillow's default, 6, and the file is little larger
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _warn_renamed(owner: str) -> None:
    message = f"{owner}.picture has been renamed: use {owner}.source_image"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image and the vision encoder's output for it, which any number of tasks can share."""

    stored: npt.NDArray[np.float32] | DeviceArray = field(repr=False)
    """Image features `(N, D)`, in the memory of the device that computed them."""
    source_image: PILImage.Image = field(repr=False)
    """The image that was encoded, RGB."""
    placement: Placement | None = None
    """How it was fitted into the vision encoder's input; None where it was stretched to the model's default size."""

    @property
    def is_padded(self) -> bool:
        """Whether the vision encoder saw margins, so that location bins are not those of `source_image`."""
        return self.placement is not None and self.placement.fit == "pad"

    @property
    def num_image_tokens(self) -> int:
        """N, the rows of its features; more at larger image sizes."""
        return int(self.stored.shape[0])

    @property
    def picture(self) -> PILImage.Image:
        """Deprecated name of `source_image`."""
        _warn_renamed("EncodedImage")
        return self.source_image

    @cached_property
    def image_features(self) -> npt.NDArray[np.float32]:
        """Image features `(N, D)` on the host; copied from a device at the first access."""
        return self.stored.download() if isinstance(self.stored, DeviceArray) else self.stored

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the features as an array on the host: another process cannot read this one's device memory."""
        return EncodedImage, (self.image_features, self.source_image, self.placement)

    @property
    def size(self) -> tuple[int, int]:
        """`(width, height)` in pixels; all coordinates of results refer to it."""
        return self.source_image.size


@dataclass(frozen=True)
class Prediction(Generic[R]):
    """The answer to one request: results, and what they were made of."""

    results: R
    """The parsed answer; see `florence_onnx.answers.results`."""
    task: Task[R]
    """The task of the request."""
    text: str
    """The generated text, with special and location tokens."""
    token_ids: tuple[int, ...]
    """The generated tokens, from the decoder start token on."""
    truncated: Truncated
    """True if the token limit cut the answer off, `"deadline"` or `"cancelled"` if the caller did; its last item may be missing or
    incomplete then. False for a complete answer."""
    source_image: PILImage.Image = field(repr=False, compare=False)
    """The image of the request, RGB."""
    alternatives: tuple[Prediction[R], ...] = ()
    """The other answers, where `num_return_sequences` asks for more than one: from beam search best first."""

    token_logprobs: tuple[float, ...] | None = field(default=None, compare=False)
    """Log-probability of each of `token_ids` by the model itself, before any other generation option; None without the option
    `scores`. 0 for tokens that were given: the start token, and a forced first one."""
    text_score: TextScore | None = field(default=None, compare=False)
    """How sure the model was of an answer that is text, also word by word; None for others and without the option `scores`."""

    choice_logprobs: Mapping[str, float] | None = field(default=None, compare=False)
    """Log-probability of each choice as the whole answer, best first, where the option `constrain` is a `Choice`."""

    @property
    def sequence_logprob(self) -> float | None:
        """Log-probability of the whole answer: the sum of `token_logprobs`."""
        return None if self.token_logprobs is None else sum(self.token_logprobs)

    @property
    def picture(self) -> PILImage.Image:
        """Deprecated name of `source_image`."""
        _warn_renamed("Prediction")
        return self.source_image

    @property
    def image(self) -> Image | None:
        """The annotated image as a PNG in a `data:` URI, in fal's shape; None for tasks without geometry."""
        if not self.task.has_image:
            return None
        content = encode_png(self.draw())
        encoded = base64.b64encode(content).decode("ascii")
        return Image(
            url=f"data:image/png;base64,{encoded}",
            content_type="image/png",
            file_name=f"{self.task.slug}.png",
            file_size=len(content),
            width=self.source_image.width,
            height=self.source_image.height,
        )

    def draw(self) -> PILImage.Image:
        """The image with the answer drawn on it.

        Raises:
            InputError: The answer is text.
        """
        if isinstance(self.results, str):
            raise InputError(f"{self.task.slug} answers with text: there is nothing to draw")
        from florence_onnx.answers import draw  # fonts and drawing take time to import

        return draw.draw(self.source_image, self.results)

    def to_dict(self, *, with_image: bool = False, with_scores: bool = False) -> dict[str, Any]:
        """fal's JSON for this answer.

        Args:
            with_image: Whether to draw and include the annotated image; otherwise `image` is None.
            with_scores: Whether to add what fal's JSON does not have: `score` of each box, quad and outline (null without
                the option `scores`), `sequence_logprob`, and `text_score` of an answer that is text; `choice_logprobs` where the
                option `constrain` is a `Choice`.

        Returns:
            `{"results": …}`, and `"image"` for tasks with geometry, as fal has it.
        """
        answer: dict[str, Any] = {"results": to_dict(self.results, with_scores=with_scores)}
        if with_scores:
            answer["sequence_logprob"] = self.sequence_logprob
            if isinstance(self.results, str):
                answer["text_score"] = to_dict(self.text_score)
            if self.choice_logprobs is not None:
                answer["choice_logprobs"] = dict(self.choice_logprobs)
        if self.task.has_image:
            answer["image"] = to_dict(self.image) if with_image else None
        return answer

    def above(self, min_score: float) -> Prediction[R]:
        """The prediction with only the boxes, quads and outlines whose score is at least `min_score`.

        Raises:
            InputError: The answer is text, or has no scores.
        """
        from florence_onnx.answers.scoring import keep_above

        return replace(self, results=keep_above(self.results, min_score))

    def to_transformers(self, *, integers: bool = True) -> dict[str, Any]:
        """The dict that transformers' `processor.post_process_generation` returns for this answer.

        Args:
            integers: Whether coordinates are truncated to integers, as transformers does. False keeps the floats of
                Microsoft's code.

        Returns:
            `{task token: answer}`; see `florence_onnx.answers.reference_dict`. With the option `scores` boxes of `<OD>` and
            `<DENSE_REGION_CAPTION>` come with `scores`, as Microsoft's code for large has them.
        """
        from florence_onnx.answers.postprocess import description_with_bboxes_or_polygons
        from florence_onnx.answers.reference_dict import reference_dict

        with_polygons = self.task.parser is description_with_bboxes_or_polygons
        has_scores = self.token_logprobs is not None
        with_scores = has_scores and self.task in (OBJECT_DETECTION, DENSE_REGION_CAPTION)
        return {
            self.task.token: reference_dict(
                self.results, with_polygons=with_polygons, integers=integers, with_scores=with_scores
            )
        }

    def to_coco(self, image_id: int = 1, categories: Sequence[str] = ()) -> list[dict[str, Any]]:
        """This answer as annotations in COCO's form: pixels, `bbox` as `[x, y, w, h]`, `score` where there is one.

        Args:
            image_id: Of the image.
            categories: Names of the categories whose ids are 1, 2, …; further labels are numbered behind them.
        """
        from florence_onnx.forms import boxes, labelled

        (found,), classes, _ = labelled.classify([self._labelled("image")], categories)
        pairs = enumerate(found.shapes, 1)
        return [boxes.coco_annotation(each, n, image_id, classes.index(each.label) + 1) for n, each in pairs]

    def to_labelme(self, image_path: str) -> dict[str, Any]:
        """This answer as LabelMe's (and X-AnyLabeling's) JSON for an image of that name."""
        from florence_onnx.forms import boxes

        return boxes.labelme(self._labelled(image_path))

    def to_label_studio(self, image_url: str) -> dict[str, Any]:
        """This answer as a task of Label Studio with a prediction, for an image at that address."""
        from florence_onnx.forms import label_studio

        return label_studio.tasks([self._labelled(image_url)])[0]

    def _labelled(self, name: str) -> LabelledImage:
        from florence_onnx.forms import labelled

        return labelled.of_results(self.results, self.source_image.size, name, self.task.slug)

    def to_supervision(self, classes: Sequence[str] | None = None) -> Detections:
        """This answer as `supervision.Detections`; needs the extra `supervision`.

        Args:
            classes: Labels in the order of their class ids (others get -1); None numbers the labels of this answer alphabetically.

        Raises:
            InputError: The answer is text.
            MissingExtraError: supervision is not installed.
        """
        from florence_onnx.answers.supervision_detections import to_detections

        return to_detections(self.results, self.source_image.size, classes)


def with_scores(
    prediction: Prediction[Any],
    scores: TokenScores,
    decode: Callable[[Sequence[int]], str],
    token_text: Callable[[int], str],
    location_ids: range | None,
    calibration: Calibration | None = None,
) -> Prediction[Any]:
    """Adds the scores of the tokens to a prediction, and those of what was made of them.

    Args:
        prediction: Without scores.
        scores: Of its `token_ids`.
        decode: Turns token ids into text.
        token_text: Turns a single one into text.
        location_ids: Ids of `<loc_0>` to `<loc_999>`; None where the vocabulary has none.
        calibration: Of the task's scores; None leaves them as the model has them.
    """
    from florence_onnx.answers import scoring

    locations = location_ids or range(0)
    columns = zip(prediction.token_ids, scores.log_probs, scores.near, strict=True)
    tokens = [
        scoring.ScoredToken(token, token_text(token), log_prob, near, token in locations, index < scores.num_given)
        for index, (token, log_prob, near) in enumerate(columns)
    ]
    is_text = isinstance(prediction.results, str)
    return replace(
        prediction,
        results=scoring.score_results(
            prediction.results, prediction.task.parser, prediction.text, tokens, decode, calibration
        ),
        text_score=scoring.score_text(tokens, decode) if is_text else None,
        token_logprobs=scores.log_probs,
    )


def with_choices(
    prediction: Prediction[Any],
    choices: Iterable[tuple[Sequence[int], float]],
    decode: Callable[[Sequence[int]], str],
) -> Prediction[Any]:
    """Adds the scores of all choices to a prediction.

    Args:
        prediction: Without them.
        choices: Tokens and log-probability of each.
        decode: Turns token ids into text.
    """
    ranked = sorted(choices, key=lambda choice: -choice[1])
    return replace(prediction, choice_logprobs={decode(tokens): log_prob for tokens, log_prob in ranked})
