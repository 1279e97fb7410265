"""One tool a task, on the `mcp` package's own server."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, TextContent, ToolAnnotations
from PIL import Image as PILImage
from pydantic import Field

from florence_onnx import forks, tasks
from florence_onnx._version import __version__
from florence_onnx.answers.locations import Region
from florence_onnx.detecting.detections import Detections
from florence_onnx.errors import FlorenceError, ImageError
from florence_onnx.images import url
from florence_onnx.model import Florence2
from florence_onnx.prediction import EncodedImage, Prediction, encode_png
from florence_onnx.tasks import Task

INSTRUCTIONS = (
    "Florence-2, a vision model that runs on this machine. Coordinates are pixels of the image, from its top-left corner; "
    "boxes are x, y, w, h. Ask `caption` or `detailed-caption` what an image shows, `ocr` for its text, `object-detection` "
    "for its objects, `detect` to find the things of a list and which of them are not there, "
    "`open-vocabulary-detection` or `caption-to-phrase-grounding` to find something by name."
)

MAX_CLASSES = 32
"""Most names in a call of `detect`."""
ImageArgument = Annotated[str, Field(description="Path of an image file, an http(s) URL, or a data: URI.")]
TextArgument = Annotated[str, Field(description="What to look for, in English.")]
ClassesArgument = Annotated[
    list[str],
    Field(description="Names of what to look for, such as car or red kite.", min_length=1, max_length=MAX_CLASSES),
]
ScoreArgument = Annotated[float, Field(description="Drop boxes with a lower score.", ge=0, le=1)]
Pixels = Annotated[float, Field(description="In pixels of the image.")]
AnnotatedArgument = Annotated[bool, Field(description="Whether to also return the image with the answer drawn on it.")]

Answer = Callable[..., CallToolResult]


class Images:
    """Images by the string that a caller gives, within what the server may read."""

    def __init__(self, roots: Sequence[Path] = (), allowed_hosts: Sequence[str] = ()) -> None:
        """Args:
        roots: Folders that files may be in; none allows all.
        allowed_hosts: `HOST[:PORT]` that URLs may lead to although they are not public.
        """
        self._roots = [root.resolve() for root in roots]
        self._allowed_hosts = tuple(allowed_hosts)

    def encode(self, model: Florence2, image: str) -> EncodedImage:
        """Loads and encodes an image. URLs must lead to the public internet: an assistant may have them from a web page.

        Raises:
            ImageError: It cannot be read, or may not be.
        """
        if url.is_url(image) or url.is_data_uri(image):
            return model.encode(image, public_only=True, allowed_hosts=self._allowed_hosts)
        path = Path(image).expanduser().resolve()
        if self._roots and not any(path.is_relative_to(root) for root in self._roots):
            raise ImageError(f"{image} lies in none of the folders that this server may read: give --root for it")
        return model.encode(path)


class _Model:
    """A model that is loaded once in a process: by a thread when the server starts, and anew in a forked child."""

    def __init__(self, load: Callable[[], Florence2]) -> None:
        self._load = load
        self._lock = forks.Lock()
        self._loaded: Florence2 | None = None
        self._error: Exception | None = None

    def start(self) -> None:
        """Begins to load."""
        threading.Thread(target=self._load_once, name="load", daemon=True).start()

    def get(self) -> Florence2:
        """Waits for the model, and raises what loading it raised."""
        self._load_once()
        if self._loaded is None:
            assert self._error is not None
            raise self._error
        return self._loaded

    def _load_once(self) -> None:
        with self._lock:
            if self._loaded is None and self._error is None:
                try:
                    self._loaded = self._load()
                except Exception as error:  # noqa: BLE001 - raised in every thread that asks for the model
                    self._error = error


def make_server(load: Callable[[], Florence2], images: Images, own: Mapping[str, Task[Any]] | None = None) -> MCPServer:
    """A server with a tool for every task.

    Args:
        load: Loads the model; called once, in a thread, when the server starts, so that it answers at once.
        images: How images are found.
        own: Tasks that the model's bundle carries, by slug.
    """
    model = _Model(load)

    @asynccontextmanager
    async def lifespan(_: MCPServer) -> AsyncIterator[None]:
        model.start()
        yield

    def ask(
        task: Task[Any], image: str, annotated: bool, text_input: str | None = None, box: Sequence[float] | None = None
    ) -> CallToolResult:
        try:
            florence = model.get()
            encoded = images.encode(florence, image)
            region = None if box is None else Region.from_pixels(box[0], box[1], box[2], box[3], encoded.size)
            return _to_result(florence.run(task, encoded, text_input=text_input, region=region), annotated)
        except FlorenceError as error:
            raise ToolError(str(error)) from error

    def detect(
        image: ImageArgument,
        classes: ClassesArgument,
        min_score: ScoreArgument = 0.0,
        annotated: AnnotatedArgument = False,
    ) -> CallToolResult:
        try:
            florence = model.get()
            found = florence.detect(images.encode(florence, image), classes, min_score=min_score)
        except FlorenceError as error:
            raise ToolError(str(error)) from error
        return _detections(found, annotated)

    server = MCPServer(
        "florence-2", version=__version__, instructions=INSTRUCTIONS, lifespan=lifespan, log_level="WARNING"
    )
    annotations = ToolAnnotations(read_only_hint=True, open_world_hint=True)
    for task in (*tasks.TASKS.values(), *(own or {}).values()):
        server.add_tool(
            _tool(task, ask),
            name=task.slug,
            description=_describe(task),
            annotations=annotations,
            structured_output=False,
        )
    server.add_tool(
        detect,
        name="detect",
        description="Finds the things of a list by name, as boxes with scores, and says which of them are not there.",
        annotations=annotations,
        structured_output=False,
    )
    return server


def _tool(task: Task[Any], ask: Answer) -> Answer:
    """A function with the parameters that the task takes, which is where the tool's schema comes from."""

    def about_image(image: ImageArgument, annotated: AnnotatedArgument = False) -> CallToolResult:
        return ask(task, image, annotated)

    def about_text(
        image: ImageArgument, text_input: TextArgument, annotated: AnnotatedArgument = False
    ) -> CallToolResult:
        return ask(task, image, annotated, text_input)

    def about_region(
        image: ImageArgument, x1: Pixels, y1: Pixels, x2: Pixels, y2: Pixels, annotated: AnnotatedArgument = False
    ) -> CallToolResult:
        return ask(task, image, annotated, None, (x1, y1, x2, y2))

    def about_text_and_region(
        image: ImageArgument,
        text_input: TextArgument,
        x1: Pixels,
        y1: Pixels,
        x2: Pixels,
        y2: Pixels,
        annotated: AnnotatedArgument = False,
    ) -> CallToolResult:
        return ask(task, image, annotated, text_input, (x1, y1, x2, y2))

    by_needs: dict[str, Answer] = {
        "nothing": about_image,
        "text": about_text,
        "region": about_region,
        "text+region": about_text_and_region,
    }
    return by_needs[task.needs]


_DESCRIPTIONS = {
    "object-detection": "Finds the objects in an image: a label and a box for each.",
    "dense-region-caption": "Finds the regions of an image, with a short description and a box for each.",
    "region-proposal": "Finds regions of an image that may hold something, as boxes without labels.",
    "open-vocabulary-detection": "Finds one kind of thing by name, as boxes. Answers with a box even where there is none.",
    "caption-to-phrase-grounding": "Finds what each phrase of a sentence names, as labelled boxes.",
    "ocr-with-region": "Reads the text in an image, line by line, with a box for each line.",
    "referring-expression-segmentation": "Outlines what an expression refers to, as polygons.",
    "region-to-segmentation": "Outlines the object in a region, as polygons.",
    "caption": "Says in one sentence what an image shows.",
    "detailed-caption": "Says in some sentences what an image shows.",
    "more-detailed-caption": "Says in a paragraph what an image shows.",
    "ocr": "Reads the text in an image.",
    "region-to-category": "Says what kind of thing is in a region of an image.",
    "region-to-description": "Describes what is in a region of an image.",
    "region-to-ocr": "Reads the text in a region of an image.",
}


def _describe(task: Task[Any]) -> str:
    return _DESCRIPTIONS.get(task.slug) or task.description or f"A task of this fine-tune, {task.token}."


def _to_result(prediction: Prediction[Any], annotated: bool) -> CallToolResult:
    """fal's JSON as structured content and as text, for clients that read only that, and the annotated image."""
    answer: dict[str, Any] = {"results": prediction.to_dict()["results"], "truncated": prediction.truncated}
    results = answer["results"]
    text = results if isinstance(results, str) else json.dumps(results, ensure_ascii=False)
    return _result(answer, text, prediction.draw if annotated else None)


def _detections(found: Detections, annotated: bool) -> CallToolResult:
    absent = [name for name, boxes in found.by_class.items() if not boxes]
    answer = {**found.to_dict(), "absent": absent}
    return _result(answer, json.dumps(answer, ensure_ascii=False), found.draw if annotated else None)


def _result(answer: dict[str, Any], text: str, draw: Callable[[], PILImage.Image] | None) -> CallToolResult:
    content: list[Any] = [TextContent(type="text", text=text)]
    if draw is not None:
        content.append(Image(data=encode_png(draw()), format="png").to_image_content())
    return CallToolResult(content=content, structured_content=answer)
