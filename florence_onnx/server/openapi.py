"""The OpenAPI document, with fal's titles, fields and order of fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from florence_onnx import __version__, tasks
from florence_onnx.answers import postprocess
from florence_onnx.fal import extensions
from florence_onnx.fal.contract import APP, MAX_BIN
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.tasks import Task
from florence_onnx.tiling.tiles import MAX_OVERLAP, MIN_SIZE

Schema = dict[str, Any]
_TEXT_AND_REGION = "ImageWithTextAndUserCoordinatesInput"
EXAMPLE_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGklEQVR42mO8"
    "o6HBQApgYiARjGoY1TB0NAAAyVkBTB15Un8AAAAASUVORK5CYII="
)
"""A red square, so that the example works without a network."""


def document(known: Mapping[str, Task[Any]] = tasks.TASKS, *, has_options: bool = False) -> dict[str, Any]:
    """Builds the document: every endpoint, direct and through the queue, and the operational endpoints.

    Args:
        known: The model's tasks by slug; an endpoint each.
        has_options: Whether requests may state generation options.
    """
    paths: dict[str, Any] = {}
    for task in known.values():
        paths[f"/{APP}/{task.slug}"] = {"post": _run(task)}
        paths[f"/{APP}/{task.slug}/stream"] = {"post": _stream(task)}
        paths[f"/queue/{APP}/{task.slug}"] = {"post": _submit(task)}
    paths |= _queue_paths() | _operation_paths()
    found = _with_extensions(schemas())
    found = _with_options(found) if has_options else found
    if all(task.needs != "text+region" for task in known.values()):
        del found[_TEXT_AND_REGION]  # fal has no such task
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Florence-2, as fal-ai/florence-2-large",
            "version": __version__,
            "description": "Florence-2 on ONNX Runtime, with the API of fal.",
        },
        "paths": paths,
        "components": {
            "schemas": found,
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "Authorization", "description": "`Key …`"}
            },
        },
        "security": [{}, {"key": []}],
    }


def input_name(task: Task[Any]) -> str:
    """Returns fal's title of an endpoint's input."""
    return {
        "nothing": "ImageInput",
        "text": "ImageWithTextInput",
        "region": "ImageWithUserCoordinatesInput",
        "text+region": _TEXT_AND_REGION,
    }[task.needs]


def output_name(task: Task[Any]) -> str:
    """Returns fal's title of an endpoint's output."""
    if not task.has_image:
        return "TextOutput"
    if task.parser is postprocess.ocr:
        return "OCRBoundingBoxOutputWithLabels"
    is_outline = task.parser in (postprocess.polygons, postprocess.description_with_polygons)
    return "PolygonOutputWithLabels" if is_outline else "BoundingBoxOutputWithLabels"


def schemas() -> dict[str, Schema]:
    """Returns the schemas of all inputs, outputs and errors by title."""
    image_url = {**_string("The URL of the image to be processed."), "examples": [EXAMPLE_IMAGE]}
    text_input = _string("Text input for the task")
    region = {"$ref": "#/components/schemas/Region", "description": "The user input coordinates"}
    box = {
        "x": _number("X-coordinate of the top-left corner"),
        "y": _number("Y-coordinate of the top-left corner"),
        "w": _number("Width of the bounding box"),
        "h": _number("Height of the bounding box"),
        "label": _string("Label of the bounding box"),
    }
    bins = {
        f"{axis.lower()}{number}": {
            "type": "integer",
            "minimum": 0,
            "maximum": MAX_BIN,
            "description": f"{axis}-coordinate of the {corner} corner",
        }
        for number, corner in ((1, "top-left"), (2, "bottom-right"))
        for axis in "XY"
    }
    points = {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "number"}}}
    image = {
        "url": _string("The URL where the file can be downloaded from."),
        "content_type": _optional("string", "The mime type of the file."),
        "file_name": _optional("string", "The name of the file."),
        "file_size": _optional("integer", "The size of the file in bytes."),
        "width": _optional("integer", "The width of the image in pixels."),
        "height": _optional("integer", "The height of the image in pixels."),
    }
    return {
        "ImageInput": _object("ImageInput", {"image_url": image_url}),
        "ImageWithTextInput": _object("ImageWithTextInput", {"image_url": image_url, "text_input": text_input}),
        "ImageWithUserCoordinatesInput": _object(
            "ImageWithUserCoordinatesInput", {"image_url": image_url, "region": region}
        ),
        _TEXT_AND_REGION: _object(
            _TEXT_AND_REGION, {"image_url": image_url, "text_input": text_input, "region": region}
        ),
        "Region": _object("Region", bins),
        "BoundingBoxOutputWithLabels": _output("BoundingBoxOutputWithLabels", "BoundingBoxes"),
        "BoundingBoxes": _object("BoundingBoxes", {"bboxes": _list("BoundingBox", "List of bounding boxes")}),
        "BoundingBox": _object("BoundingBox", box),
        "OCRBoundingBoxOutputWithLabels": _output("OCRBoundingBoxOutputWithLabels", "OCRBoundingBox"),
        "OCRBoundingBox": _object(
            "OCRBoundingBox", {"quad_boxes": _list("OCRBoundingBoxSingle", "List of quadrilateral boxes")}
        ),
        "OCRBoundingBoxSingle": _object("OCRBoundingBoxSingle", box),
        "PolygonOutputWithLabels": _output("PolygonOutputWithLabels", "PolygonOutput"),
        "PolygonOutput": _object("PolygonOutput", {"polygons": _list("Polygon", "List of polygons")}),
        "Polygon": _object(
            "Polygon", {"points": {**points, "description": "List of points"}, "label": _string("Label of the polygon")}
        ),
        "TextOutput": _object("TextOutput", {"results": _string("Results from the model")}),
        "Image": _object("Image", image, required=["url"]),
        "Error": _object("Error", {"detail": {}, "error_type": _string("The error type.")}, required=["detail"]),
        "QueueStatus": _object(
            "QueueStatus",
            {
                "status": {"type": "string", "enum": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]},
                "request_id": _string("The request id."),
                "response_url": _string("The response url."),
                "status_url": _string("The status url."),
                "cancel_url": _string("The cancel url."),
                "queue_position": {"type": "integer", "description": "The queue position."},
                "logs": {"description": "The logs."},
                "metrics": {"type": "object", "description": "The metrics."},
            },
            required=["status", "request_id"],
        ),
    }


def _with_extensions(found: dict[str, Schema]) -> dict[str, Schema]:
    """The schemas, with the fields of `fal.extensions` among those of each input; none of them is required."""
    share: Schema = {"type": "number", "minimum": 0, "maximum": 1}
    for_all: dict[str, Schema] = {
        "deadline": {
            "type": "number",
            "minimum": 0,
            "maximum": extensions.MAX_SECONDS,
            "description": "Seconds from the acceptance of the request on after which its answer ends as far as it goes; "
            "`extra.truncated` is `deadline` then. Not in fal's API.",
        },
        "scores": {
            "type": "boolean",
            "description": "Whether `extra` has scores (with the header X-Florence-Extra: 1). Not in fal's API.",
        },
    }
    for_text: dict[str, Schema] = {
        "classes": {
            "type": "array",
            "items": {"type": "string", "pattern": r"\S"},
            "minItems": 1,
            "maxItems": extensions.MAX_CLASSES,
            "description": "Of open-vocabulary-detection and caption-to-phrase-grounding: names to look for, each by itself; "
            "text_input is not read then. Absent ones have no boxes; see `extra.presence`. Not in fal's API.",
        },
        "nms": {
            **share,
            "description": "With classes: which overlap of two boxes of a class is too much. Not in fal's API.",
        },
        "absent": {
            "enum": list(extensions.RULES),
            "description": "With classes: the rule by which absent ones are recognised. Not in fal's API.",
        },
    }
    tiles: dict[str, Schema] = {
        "min_score": {**share, "description": "Least score of boxes, quads and outlines. Not in fal's API."},
        "tiles": {
            "type": "object",
            "properties": {
                "size": {"type": "integer", "minimum": MIN_SIZE},
                "overlap": {"type": "number", "minimum": 0, "maximum": MAX_OVERLAP},
                "whole": {"type": "boolean"},
            },
            "additionalProperties": False,
            "description": f"Ask a large image in tiles of so many pixels, at most {extensions.MAX_TILES}; of tasks whose "
            "answers have places. Not in fal's API.",
        },
    }
    for title in (name for name in found if name.startswith("Image") and name.endswith("Input")):
        own = for_all | (tiles if "region" not in found[title]["properties"] else {})
        own = own | (for_text if title == "ImageWithTextInput" else {})
        properties = {**found[title]["properties"], **{name: _nullable(each) for name, each in own.items()}}
        found[title] = _object(title, properties, required=found[title]["required"])
    with_text = found["ImageWithTextInput"]
    with_text["required"] = ["image_url"]
    with_text["anyOf"] = [{"required": ["text_input"]}, {"required": ["classes"]}]
    return found


def _nullable(schema: Schema) -> Schema:
    """A schema that allows null too, which stands for an absent field."""
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]}


def _with_options(found: dict[str, Schema]) -> dict[str, Schema]:
    """The schemas, with every generation option among the fields of each input; none of them is required."""
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    kinds: dict[str, Schema] = {
        "bool": {"type": "boolean"},
        "int": {"type": "integer"},
        "float": {"type": "number"},
        "EarlyStopping": {"enum": [True, False, "never"]},
        "int | Sequence[int]": {"anyOf": [{"type": "integer"}, ids]},
        "Sequence[int]": ids,
        "Sequence[Sequence[int]]": {"type": "array", "items": ids},
    }
    options = {
        each.name: {
            **kinds.get(str(each.type).removesuffix(" | None"), {"type": "array"}),
            "description": f"Generation option {each.name}, as in transformers",
        }
        for each in dataclasses.fields(GenerationOptions)
    }
    options["constrain"] = {
        "type": "object",
        "maxProperties": 1,
        "description": 'What the answer may be: {"boxes": {"labels": [...]}}, {"quads": {}}, {"polygons": {}}, {"text": {}}, '
        '{"task": {"name": "...", "labels": [...]}} or {"choices": [...]}',
    }
    for title in (name for name in found if name.startswith("Image") and name.endswith("Input")):
        properties = {**found[title]["properties"], **options}
        found[title] = {**found[title], **_object(title, properties, required=found[title]["required"])}
    return found


def _string(description: str) -> Schema:
    return {"type": "string", "description": description}


def _number(description: str) -> Schema:
    return {"type": "number", "description": description}


def _optional(kind: str, description: str) -> Schema:
    return {"anyOf": [{"type": kind}, {"type": "null"}], "description": description}


def _list(title: str, description: str) -> Schema:
    return {"type": "array", "items": {"$ref": f"#/components/schemas/{title}"}, "description": description}


def _object(title: str, properties: dict[str, Schema], required: list[str] | None = None) -> Schema:
    return {
        "title": title,
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "x-fal-order-properties": list(properties),
    }


def _output(title: str, results: str) -> Schema:
    properties: dict[str, Schema] = {
        "results": {"$ref": f"#/components/schemas/{results}", "description": "Results from the model"},
        "image": {
            "anyOf": [{"$ref": "#/components/schemas/Image"}, {"type": "null"}],
            "description": "Processed image",
        },
    }
    return _object(title, properties, required=["results"])


def _json(schema: str, description: str) -> Schema:
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {"description": description, "content": {"application/json": {"schema": reference}}}


def _errors(*statuses: int) -> dict[str, Schema]:
    meaning = {
        400: "Malformed request, or a feature that is not supported",
        401: "The API key is missing or wrong",
        403: "Called by a web page of another origin",
        404: "No such request, or its result has expired",
        413: "The body is too large",
        422: "An argument or the image is invalid",
        429: "The queue is full",
        499: "Cancelled",
        500: "Internal error",
        503: "The server is shutting down",
        504: "The request's own start timeout has passed",
    }
    return {str(status): _json("Error", meaning[status]) for status in statuses}


def _run(task: Task[Any]) -> Schema:
    return {
        "operationId": task.slug,
        "summary": task.slug,
        **({"description": task.description} if task.description else {}),
        "requestBody": _body(task),
        "responses": {
            "200": _json(output_name(task), "The result"),
            **_errors(400, 401, 403, 413, 422, 429, 499, 500, 503, 504),
        },
    }


def _stream(task: Task[Any]) -> Schema:
    return {
        "operationId": f"stream-{task.slug}",
        "summary": f"{task.slug}, in parts as they are complete",
        "requestBody": _body(task),
        "responses": {
            "200": {
                "description": "Server-sent events; the last one is the result",
                "content": {"text/event-stream": {}},
            },
            **_errors(400, 401, 403, 413, 422, 429, 499, 500, 503, 504),
        },
    }


def _submit(task: Task[Any]) -> Schema:
    return {
        "operationId": f"submit-{task.slug}",
        "summary": f"{task.slug}, through the queue",
        "requestBody": _body(task),
        "responses": {"200": _json("QueueStatus", "Accepted"), **_errors(400, 401, 403, 413, 422, 429, 503)},
    }


def _body(task: Task[Any]) -> Schema:
    reference = {"$ref": f"#/components/schemas/{input_name(task)}"}
    return {"required": True, "content": {"application/json": {"schema": reference}}}


def _queue_paths() -> dict[str, Any]:
    request_id = {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string"}}
    logs = {"name": "logs", "in": "query", "required": False, "schema": {"type": "boolean"}}
    base = f"/queue/{APP}/requests/{{request_id}}"
    stream = {"description": "Server-sent events", "content": {"text/event-stream": {}}}
    status = {
        "200": _json("QueueStatus", "Completed"),
        "202": _json("QueueStatus", "Not completed"),
        **_errors(401, 403, 404),
    }
    result = {"200": {"description": "The result", "content": {"application/json": {"schema": {"type": "object"}}}}}
    cancelled = {
        "202": {
            "description": "Cancellation requested",
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
    }
    return {
        base: {
            "get": {
                "parameters": [request_id],
                "responses": result | _errors(400, 401, 403, 404, 422, 499, 500, 503, 504),
            }
        },
        f"{base}/status": {"get": {"parameters": [request_id, logs], "responses": status}},
        f"{base}/status/stream": {
            "get": {"parameters": [request_id, logs], "responses": {"200": stream, **_errors(401, 403, 404)}}
        },
        f"{base}/cancel": {"put": {"parameters": [request_id], "responses": cancelled | _errors(400, 401, 403, 404)}},
    }


def _operation_paths() -> dict[str, Any]:
    plain = {"content": {"application/json": {"schema": {"type": "object"}}}}
    metrics = {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {
        "/health": {"get": {"responses": {"200": {"description": "The process is alive", **plain}}, "security": []}},
        "/ready": {
            "get": {
                "responses": {"200": {"description": "The server accepts requests", **plain}, **_errors(503)},
                "security": [],
            }
        },
        "/metrics": {"get": {"responses": {"200": metrics, **_errors(401, 403)}}},
    }
