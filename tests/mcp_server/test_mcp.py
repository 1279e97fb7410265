"""The MCP server, as a process, called with the `mcp` package's own client."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from PIL import Image

from florence_onnx import Florence2, Region, tasks
from tests.own_tasks import REGION, SAME_AS, copy_demo

mcp = pytest.importorskip("mcp", reason="pip install -e '.[mcp]'")

SAMPLES = Path(tasks.__file__).parent / "demo" / "samples"
SAMPLE = str(SAMPLES / "scene-1.png")


def call(work: Callable[[Any], Any], *options: str) -> Any:
    """What some work with a client of a fresh server process gives."""
    parameters = mcp.StdioServerParameters(command=sys.executable, args=["-m", "florence_onnx", "mcp", *options])

    async def run() -> Any:
        async with mcp.Client(parameters, read_timeout_seconds=120) as client:
            return await work(client)

    return anyio.run(run)


def test_every_task_is_a_tool_with_the_arguments_that_it_takes() -> None:
    async def work(client: Any) -> Any:
        return (await client.list_tools()).tools

    found = {tool.name: tool for tool in call(work)}
    assert set(found) == {*tasks.TASKS, "detect"}
    taken = {"nothing": set(), "text": {"text_input"}, "region": {"x1", "y1", "x2", "y2"}}
    for task in tasks.TASKS.values():
        schema = found[task.slug].input_schema
        assert set(schema["properties"]) == {"image", "annotated"} | taken[task.needs]
        assert set(schema["required"]) == {"image"} | taken[task.needs]
        assert found[task.slug].description


def test_a_list_of_classes() -> None:
    classes = ["red circle", "green square", "yellow star"]

    async def work(client: Any) -> Any:
        asked = {"image": SAMPLE, "classes": classes}
        many = {**asked, "classes": [f"thing {number}" for number in range(33)]}
        return [
            await client.call_tool("detect", given)
            for given in (
                asked,
                {**asked, "annotated": True},
                many,
                {**asked, "classes": []},
                {**asked, "classes": [" "]},
            )
        ]

    plain, annotated, *refused = call(work)
    expected = Florence2.from_pretrained("demo", device="cpu").detect(SAMPLE, classes)
    answer = plain.structured_content
    assert [box["label"] for boxes in answer["results"].values() for box in boxes] == [
        box.label for box in expected.bboxes
    ]
    assert answer["absent"] == [name for name in classes if name not in expected.present] and answer["absent"]
    assert [each.type for each in annotated.content] == ["text", "image"]
    assert all(each.is_error for each in refused)


def test_tools_answer_as_the_model_does() -> None:
    region = (80, 165, 145, 230)
    asked: dict[str, dict[str, Any]] = {
        "caption": {},
        "object-detection": {},
        "open-vocabulary-detection": {"text_input": "red circle"},
        "region-to-category": dict(zip(("x1", "y1", "x2", "y2"), region, strict=True)),
        "region-to-segmentation": dict(zip(("x1", "y1", "x2", "y2"), region, strict=True)),
    }

    async def work(client: Any) -> Any:
        return {slug: await client.call_tool(slug, {"image": SAMPLE, **more}) for slug, more in asked.items()}

    model = Florence2.from_pretrained("demo", device="cpu")
    for slug, answer in call(work).items():
        given = asked[slug]
        size = Image.open(SAMPLE).size
        expected = model.run(
            slug,
            SAMPLE,
            text_input=given.get("text_input"),
            region=Region.from_pixels(*region, size) if "x1" in given else None,
        )
        assert not answer.is_error
        assert answer.structured_content == {"results": expected.to_dict()["results"], "truncated": False}
        text = answer.content[0].text
        assert (text if isinstance(expected.results, str) else json.loads(text)) == expected.to_dict()["results"]


def test_the_annotated_image_comes_on_request() -> None:
    async def work(client: Any) -> Any:
        return await client.call_tool("object-detection", {"image": SAMPLE, "annotated": True})

    text, image = call(work).content
    assert text.type == "text"
    assert image.mime_type == "image/png"
    with Image.open(io.BytesIO(base64.b64decode(image.data))) as drawn, Image.open(SAMPLE) as original:
        assert drawn.size == original.size
        assert drawn.convert("RGB").tobytes() != original.convert("RGB").tobytes()


def test_mistakes_are_answers_that_say_what_is_wrong_and_the_server_goes_on(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")

    async def work(client: Any) -> Any:
        questions: list[tuple[str, dict[str, Any]]] = [
            ("caption", {"image": str(tmp_path / "missing.png")}),
            ("caption", {"image": str(broken)}),
            ("caption", {"image": "http://127.0.0.1:1/a.png"}),
            ("caption", {}),
            ("open-vocabulary-detection", {"image": SAMPLE, "text_input": "  "}),
            ("caption", {"image": SAMPLE, "annotated": True}),
        ]
        failed = [await client.call_tool(*question) for question in questions]
        return failed, await client.call_tool("caption", {"image": SAMPLE})

    failed, good = call(work)
    assert all(answer.is_error for answer in failed)
    said = [answer.content[0].text for answer in failed]
    for text, expected in zip(
        said, ["no such image file", "not an image", "127.0.0.1", "image", "text_input", "nothing to draw"], strict=True
    ):
        assert expected in text
    assert not good.is_error


def test_files_outside_the_roots_are_refused(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a.png").write_bytes(Path(SAMPLE).read_bytes())
    (inside / "link.png").symlink_to(SAMPLE)

    async def work(client: Any) -> Any:
        paths = (inside / "a.png", inside / "link.png", inside / ".." / "b.png", SAMPLE)
        return [await client.call_tool("caption", {"image": str(path)}) for path in paths]

    good, *refused = call(work, "--root", str(inside))
    assert not good.is_error
    assert all(answer.is_error and "--root" in answer.content[0].text for answer in refused)


def test_a_model_that_does_not_load_is_said_at_the_first_call() -> None:
    async def work(client: Any) -> Any:
        return await client.call_tool("caption", {"image": SAMPLE})

    answer = call(work, "--model", "no/such/bundle")
    assert answer.is_error
    assert "no/such/bundle" in answer.content[0].text


def test_own_tasks_are_tools(tmp_path: Path) -> None:
    bundle = copy_demo(tmp_path / "bundle")
    model = Florence2.from_pretrained(bundle, device="cpu")
    width, height = Image.open(SAMPLE).size
    edges = (REGION.x1 * width, REGION.y1 * height, REGION.x2 * width, REGION.y2 * height)
    box = {name: edge / 1000 + 0.1 for name, edge in zip(("x1", "y1", "x2", "y2"), edges, strict=True)}
    asked = {"find-shapes": {}, "ask-region": {"text_input": "What is", **box}, "outline": box}

    async def work(client: Any) -> Any:
        found = {tool.name: tool for tool in (await client.list_tools()).tools}
        return found, {slug: await client.call_tool(slug, {"image": SAMPLE, **given}) for slug, given in asked.items()}

    found, answers = call(work, "--model", str(bundle))
    assert set(found) == {*tasks.TASKS, *SAME_AS, "detect"}
    assert found["find-shapes"].description == "Finds drawn shapes."
    assert found["outline"].description == "A task of this fine-tune, <OUTLINE>."
    assert {"text_input", "x1", "y1", "x2", "y2", "image"} == set(found["ask-region"].input_schema["required"])
    for slug, answer in answers.items():
        same, _, given = SAME_AS[slug]
        assert not answer.is_error, answer
        assert answer.structured_content["results"] == model.run(same, SAMPLE, **given).to_dict()["results"]
