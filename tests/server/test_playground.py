"""The playground in a real browser, against a real server with the demo model."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from florence_onnx import demo
from florence_onnx.answers import draw
from florence_onnx.tasks import TASKS
from tests.live_server import LiveServer, serve

pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")

SAMPLES = Path(demo.__file__).parent / "samples"
SCENES: dict[str, dict[str, Any]] = {
    scene["file"]: scene for scene in json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
}
PREFIX = "fal-ai/florence-2-large"
RED_CIRCLE = {"x1": 430, "y1": 364, "x2": 592, "y2": 539}
"""The red circle of scene-1, in thousandths of width and height."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(server: LiveServer, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page with the first sample; a script error or a violation of the page's content security policy fails the test."""
    errors: list[str] = []
    contexts = []

    def open_one(**options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(20_000)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if _is_error(message.text) else None)
        page.on(
            "request", lambda request: errors.append(request.url) if _is_external(request.url, server.url) else None
        )
        page.goto(server.url)
        expect(page.locator("#image-name")).to_contain_text("scene-1.png")
        return page

    expect.set_options(timeout=20_000)
    yield open_one
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()


def _is_error(message: str) -> bool:
    return "Content Security Policy" in message or "Uncaught" in message


def _is_external(url: str, home: str) -> bool:
    """Whether a request goes to another server."""
    return not url.startswith((f"{home}/", "data:", f"blob:{home}/"))


def _run(page: Page, slug: str, *, text: str | None = None, region: dict[str, int] | None = None) -> None:
    page.select_option("#task", slug)
    if text is not None:
        page.fill("#text", text)
    for name, value in (region or {}).items():
        page.fill(f"#{name}", str(value))
    page.click("#run")
    expect(page.locator("#status")).to_have_text(_starting_with("Done"))


def _starting_with(text: str) -> re.Pattern[str]:
    return re.compile(rf"^{re.escape(text)}")


def _post(server: LiveServer, slug: str, image: Path, **more: Any) -> dict[str, Any]:
    uri = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode("ascii")
    request = urllib.request.Request(
        f"{server.url}/{PREFIX}/{slug}",
        json.dumps({"image_url": uri, **more}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        body: dict[str, Any] = json.load(answer)
        return body


def _iou(a: Box, b: Box) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


def _drawn_boxes(page: Page) -> dict[int, Box]:
    """The boxes of the overlay in pixels of the image, by the index of the row."""
    frames = page.locator("#overlay .shape .line").evaluate_all(
        """lines => lines.map(line => {
            const {x, y, width, height} = line.getBBox();
            return [Number(line.parentElement.dataset.index), [x, y, x + width, y + height]];
        })"""
    )
    return {index: tuple(box) for index, box in frames}


def _row_labels(page: Page) -> list[str]:
    return page.locator("#result .row .label").all_text_contents()


def _assert_scene_is_found(page: Page, scene: dict[str, Any]) -> None:
    labels, boxes = _row_labels(page), _drawn_boxes(page)
    truth = {each["label"]: tuple(each["box"]) for each in scene["objects"]}
    assert sorted(labels) == sorted(truth)
    for index, label in enumerate(labels):
        assert _iou(boxes[index], truth[label]) > 0.5, label


# --- images


@pytest.mark.parametrize("name", ["scene-1.png", "scene-3.png"])
def test_the_boxes_of_a_sample_are_listed_and_drawn(page: Page, name: str) -> None:
    page.get_by_role("button", name=f"Sample {name.removesuffix('.png')}").click()
    expect(page.locator("#image-name")).to_contain_text(name)
    _run(page, "object-detection")
    _assert_scene_is_found(page, SCENES[name])
    assert page.locator("#overlay rect.line:visible").count() == len(SCENES[name]["objects"])
    assert sorted(page.locator("#overlay .tag text").all_text_contents()) == sorted(_row_labels(page))


def test_the_overlay_lies_on_the_image(page: Page) -> None:
    """The browser shows the same pixels inside a box as the image has there."""
    _run(page, "object-detection")
    star = _row_labels(page).index("yellow star")
    on_screen = page.locator(f"#overlay .shape[data-index='{star}'] .line").evaluate(
        """line => {
            const [box, toScreen] = [line.getBBox(), line.getScreenCTM()];
            const {x, y} = new DOMPoint(box.x, box.y).matrixTransform(toScreen);
            line.ownerSVGElement.style.visibility = "hidden";
            return {x, y, width: box.width * toScreen.a, height: box.height * toScreen.d};
        }"""
    )
    shown = Image.open(io.BytesIO(page.screenshot(clip=on_screen))).convert("RGB")
    box = _drawn_boxes(page)[star]
    expected = Image.open(SAMPLES / "scene-1.png").convert("RGB").resize(shown.size, Image.Resampling.BILINEAR, box)
    difference = ImageStat.Stat(ImageChops.difference(shown, expected)).mean
    assert max(difference) < 6


def test_a_file_is_uploaded_unchanged(page: Page, server: LiveServer, tmp_path: Path) -> None:
    image = tmp_path / "my shapes.png"
    image.write_bytes((SAMPLES / "scene-6.png").read_bytes())
    page.set_input_files("#file", image)
    expect(page.locator("#image-name")).to_have_text("my shapes.png · 384 × 384")
    with page.expect_request(f"**/{PREFIX}/caption/stream") as request:
        _run(page, "caption")
    sent = request.value.post_data_json["image_url"]
    assert base64.b64decode(sent.removeprefix("data:image/png;base64,")) == image.read_bytes()
    expect(page.locator("#result .text-result")).to_have_text(_post(server, "caption", image)["results"])


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_an_image_is_dropped_or_pasted(page: Page, way: str) -> None:
    encoded = base64.b64encode((SAMPLES / "scene-2.png").read_bytes()).decode("ascii")
    page.evaluate(
        """([way, encoded]) => {
            const bytes = Uint8Array.from(atob(encoded), letter => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "given.png", {type: "image/png"}));
            const event = way === "drop"
                ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
                : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
            document.body.dispatchEvent(event);
        }""",
        [way, encoded],
    )
    expect(page.locator("#image-name")).to_have_text("given.png · 320 × 320")


def test_a_request_waits_for_the_chosen_image(page: Page) -> None:
    held: list[Route] = []
    page.route("**/samples/scene-2.png", lambda route: held.append(route))
    with page.expect_request("**/samples/scene-2.png"):
        page.get_by_role("button", name="Sample scene-2").click()
    page.click("#run")
    expect(page.locator("#run")).to_have_attribute("aria-disabled", "true")
    held.pop().continue_()
    expect(page.locator("#status")).to_have_text(_starting_with("Done"))
    assert sorted(_row_labels(page)) == sorted(each["label"] for each in SCENES["scene-2.png"]["objects"])


def test_a_photograph_taken_sideways_has_its_boxes_in_place(page: Page, tmp_path: Path) -> None:
    image = tmp_path / "sideways.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    Image.open(SAMPLES / "scene-1.png").convert("RGB").transpose(Image.Transpose.ROTATE_90).save(
        image, exif=exif, quality=95
    )
    page.set_input_files("#file", image)
    expect(page.locator("#image-name")).to_have_text("sideways.jpg · 384 × 355")
    _run(page, "object-detection")
    _assert_scene_is_found(page, SCENES["scene-1.png"])


def test_another_image_clears_the_result_and_another_task_keeps_it(page: Page) -> None:
    _run(page, "object-detection")
    page.select_option("#task", "caption")
    expect(page.locator("#result-task")).to_have_text("Object detection")
    assert len(_drawn_boxes(page)) == 3
    page.get_by_role("button", name="Sample scene-2").click()
    expect(page.locator("#image-name")).to_contain_text("scene-2.png")
    assert _drawn_boxes(page) == {}
    expect(page.locator("#copy-json")).to_be_disabled()


# --- input


def test_a_region_drawn_with_the_mouse_is_sent(page: Page) -> None:
    page.select_option("#task", "region-to-category")
    left, top, right, bottom = _draw_region(page, SCENES["scene-1.png"]["objects"][1]["box"])
    expected = {"x1": left, "y1": top, "x2": right, "y2": bottom}
    for name, value in expected.items():
        assert abs(int(page.locator(f"#{name}").input_value()) - value) <= 1, name
    with page.expect_request(f"**/{PREFIX}/region-to-category/stream") as request:
        page.click("#run")
    assert request.value.post_data_json["region"] == {
        name: int(page.locator(f"#{name}").input_value()) for name in expected
    }
    expect(page.locator("#result .text-result")).to_have_text(_starting_with("circle"))


def test_a_region_is_drawn_in_any_direction_and_clipped_at_the_edge(page: Page) -> None:
    page.select_option("#task", "region-to-category")
    _draw_region(page, (300, 300, 400, -30))
    assert [page.locator(f"#{name}").input_value() for name in ("x1", "y1", "x2", "y2")] == ["781", "0", "999", "845"]
    frame = page.locator("#overlay .region .line")
    expect(frame).to_be_visible()
    assert float(frame.get_attribute("y") or "-1") == 0
    page.mouse.click(*_on_screen(page, (50, 50)))  # a click draws no region and keeps the last one
    assert page.locator("#x2").input_value() == "999"


def test_escape_restores_the_previous_region(page: Page) -> None:
    page.select_option("#task", "region-to-category")
    page.get_by_role("button", name="Whole image").click()
    page.mouse.move(*_on_screen(page, (50, 50)))
    page.mouse.down()
    page.mouse.move(*_on_screen(page, (150, 150)))
    expect(page.locator("#x2")).not_to_have_value("999")
    page.keyboard.press("Escape")
    page.mouse.up()
    assert [page.locator(f"#{name}").input_value() for name in RED_CIRCLE] == ["0", "0", "999", "999"]


def test_a_region_is_drawn_with_a_finger(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.select_option("#task", "region-to-category")
    page.locator("#image").scroll_into_view_if_needed()
    finger = page.context.new_cdp_session(page)
    for event, point in (("Start", (100, 100)), ("Move", (150, 160)), ("Move", (200, 250)), ("End", None)):
        touches = [] if point is None else [dict(zip("xy", _on_screen(page, point), strict=True))]
        finger.send("Input.dispatchTouchEvent", {"type": f"touch{event}", "touchPoints": touches})
    bins = [int(page.locator(f"#{name}").input_value()) for name in RED_CIRCLE]
    assert bins == pytest.approx([260, 281, 520, 704], abs=2)


def _on_screen(page: Page, point: tuple[float, float]) -> tuple[float, float]:
    """The screen position of a pixel of the 384 x 355 sample, which is centred in the stage."""
    stage = page.locator("#image").bounding_box()
    assert stage is not None
    scale = min(stage["width"] / 384, stage["height"] / 355)
    x = stage["x"] + (stage["width"] - 384 * scale) / 2 + point[0] * scale
    y = stage["y"] + (stage["height"] - 355 * scale) / 2 + point[1] * scale
    return x, y


def _draw_region(page: Page, box: Any) -> tuple[int, ...]:
    """Drags from one corner to the other; returns the bins of these pixels."""
    page.mouse.move(*_on_screen(page, (box[0], box[1])))
    page.mouse.down()
    page.mouse.move(*_on_screen(page, (box[2], box[3])), steps=4)
    page.mouse.up()
    return tuple(math.floor(value * 1000 / size) for value, size in zip(box, (384, 355, 384, 355), strict=True))


def test_text_is_sent_and_a_quad_and_a_polygon_are_drawn(page: Page) -> None:
    scene = SCENES["scene-1.png"]
    _run(page, "ocr-with-region")
    assert _row_labels(page) == [scene["word"]["text"]]
    assert page.locator("#overlay polygon.line").count() == 1
    assert _iou(_drawn_boxes(page)[0], tuple(scene["word"]["box"])) > 0.5
    _run(page, "referring-expression-segmentation", text="the yellow star")
    assert _row_labels(page) == ["Outline 1"]
    assert page.locator("#overlay .is-filled polygon.line").count() == 1
    assert _iou(_drawn_boxes(page)[0], tuple(scene["objects"][2]["box"])) > 0.5


def test_the_page_works_with_the_keyboard_alone(page: Page) -> None:
    _tab_to(page, "#task")
    page.keyboard.type("Region to c")
    for name, value in RED_CIRCLE.items():
        _tab_to(page, f"#{name}")
        page.keyboard.type(str(value))
    page.keyboard.press("Control+Enter")
    expect(page.locator("#result .text-result")).to_have_text(_starting_with("circle"))
    _tab_to(page, "#task", key="Shift+Tab")
    page.keyboard.type("Object")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#result .row")).to_have_count(3)
    _tab_to(page, ".row")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".row[data-index='1']")).to_be_focused()
    expect(page.locator(".shape[data-index='1']")).to_have_class(_has("is-active"))
    _tab_to(page, "#tab-python")
    page.keyboard.press("End")
    expect(page.locator("#code")).to_contain_text("curl ")


def _tab_to(page: Page, selector: str, key: str = "Tab") -> None:
    """Presses Tab until an element has the focus; fails if it is never reached or its focus is not visible."""
    for _ in range(40):
        page.keyboard.press(key)
        if page.locator(f"{selector}:focus").count():
            outline = page.locator(f"{selector}:focus").evaluate("element => getComputedStyle(element).outlineStyle")
            assert outline == "solid"
            return
    pytest.fail(f"{selector} cannot be reached with {key}")


# --- results


def test_rows_and_shapes_are_highlighted_together(page: Page) -> None:
    _run(page, "object-detection")
    row, shape = page.locator(".row[data-index='1']"), page.locator(".shape[data-index='1']")
    expect(row).to_have_accessible_name(re.compile(r"^red circle 0\.\d{3} x \d+, y \d+, \d+ × \d+ px$"))
    row.hover()
    expect(shape).to_have_class(_has("is-active"))
    expect(page.locator(".shape.is-active")).to_have_count(1)
    page.mouse.move(2, 2)
    expect(page.locator("#overlay .is-active, .row.is-active")).to_have_count(0)
    shape.hover()
    expect(row).to_have_class(_has("is-active"))
    expect(page.locator(".row.is-active")).to_have_count(1)
    shape.click()
    page.mouse.move(2, 2)
    expect(row).to_have_attribute("aria-pressed", "true")
    expect(shape).to_have_class(_has("is-active"))


def _has(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{name}\b")


def test_a_label_has_the_colour_of_the_drawn_image(page: Page) -> None:
    _run(page, "object-detection")
    colours = page.locator(".row .swatch").evaluate_all(
        "all => all.map(each => getComputedStyle(each).backgroundColor)"
    )
    assert colours == [f"rgb{draw.colour_of(label)}" for label in _row_labels(page)]


def test_the_json_is_what_the_server_gives_without_extras(page: Page, server: LiveServer) -> None:
    _run(page, "object-detection")
    shown = json.loads(page.locator("#json").text_content() or "")
    direct = _post(server, "object-detection", SAMPLES / "scene-1.png")
    assert shown["results"] == direct["results"]
    page.click("#copy-json")
    expect(page.locator("#status")).to_have_text("Copied.")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert list(copied) == list(direct)  # no extra
    assert copied["results"] == direct["results"]
    if direct["image"] and direct["image"]["url"].startswith("data:"):
        assert copied["image"] == direct["image"]
        assert len(shown["image"]["url"]) < 100


def test_the_time_is_shown_per_stage(page: Page) -> None:
    _run(page, "object-detection")
    names = page.locator("#timings dt").all_text_contents()
    assert {"Vision encoder", "Decoder", "Network", "Total"} <= set(names)
    values = [_to_ms(text) for text in page.locator("#timings dd").all_text_contents()]
    assert sum(values[:-1]) == pytest.approx(values[-1], rel=0.02, abs=5)
    assert values[names.index("Decoder")] > 0  # the vision encoder may be 0: its output is cached


def _to_ms(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"ms": 1, "s": 1000}[unit]


# --- errors


def test_a_missing_region_or_text_is_asked_for(page: Page) -> None:
    page.select_option("#task", "region-to-category")
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text("Draw a region on the image first")
    page.fill("#x1", "1000")
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text("whole number from 0 to 999")
    page.select_option("#task", "open-vocabulary-detection")
    expect(page.locator("#problem")).to_be_empty()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#problem")).to_have_text("This task needs a text. Enter one first.")
    expect(page.locator("#text")).to_be_focused()


def test_a_broken_file_keeps_the_image_and_its_result(page: Page, tmp_path: Path) -> None:
    _run(page, "object-detection")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    page.set_input_files("#file", broken)
    expect(page.locator("#problem")).to_contain_text("“broken.png” is not an image")
    expect(page.locator("#image-name")).to_contain_text("scene-1.png")
    expect(page.locator("#result .row")).to_have_count(3)
    _run(page, "caption")
    expect(page.locator("#problem")).to_be_empty()


def test_a_rejected_image_is_explained(page: Page, tmp_path: Path) -> None:
    """A real 422: browsers can show SVG, the server cannot read it."""
    drawing = tmp_path / "drawing.svg"
    drawing.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><circle r="9"/></svg>')
    page.set_input_files("#file", drawing)
    expect(page.locator("#image-name")).to_contain_text("drawing.svg")
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text("The server cannot read this image")
    expect(page.locator("#problem")).to_contain_text("The server said:")
    expect(page.locator("#run")).to_be_enabled()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {"detail": "No user found for Key ID and Secret"}, "requires an API key"),
        (404, {"detail": "Path /x not found"}, "does not have this task"),
        (413, {"detail": "too large"}, "image is too large"),
        (422, {"detail": [{"loc": ["body", "region"], "msg": "no", "type": "missing"}]}, "Draw a region"),
        (422, {"detail": [{"loc": ["body", "image_url"], "msg": "no", "type": "image_too_large"}]}, "too large"),
        (429, {"detail": "busy"}, "busy. Wait a moment"),
        (500, {"detail": "Internal Server Error"}, "Its log has the details under request abc"),
        (502, None, "Something went wrong on the server (HTTP 502)"),
        (504, {"detail": "Request timed out", "error_type": "request_timeout"}, "The request timed out"),
        (None, None, "cannot be reached"),
    ],
)
def test_each_failure_says_what_to_do_and_keeps_the_last_result(
    page: Page, status: int | None, body: object, words: str
) -> None:
    _run(page, "object-detection")
    page.route(f"**/{PREFIX}/**", lambda route: _fail(route, status, body))
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text(words)
    expect(page.locator("#result .row")).to_have_count(3)
    page.unroute_all()
    _run(page, "object-detection")
    expect(page.locator("#problem")).to_be_empty()


def _fail(route: Route, status: int | None, body: object) -> None:
    if status is None:
        route.abort()
        return
    text = "<h1>Bad gateway</h1>" if body is None else json.dumps(body)
    route.fulfill(status=status, body=text, headers={"x-fal-request-id": "abc"})


def test_a_request_is_cancelled(page: Page) -> None:
    page.route(f"**/{PREFIX}/**", lambda _: None)  # never answered
    page.click("#run")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#problem")).to_be_empty()


def test_a_key_is_asked_for_and_sent(browser: Browser) -> None:
    with serve("--api-key", "secret") as locked, browser.new_context() as context:
        page = context.new_page()
        page.goto(locked.url)
        expect(page.locator("#image-name")).to_contain_text("scene-1.png")
        for key, words in (("", "requires an API key"), ("wrong", "does not accept this API key")):
            page.get_by_label("API key").fill(key)
            page.click("#run")
            expect(page.locator("#problem")).to_contain_text(words)
            expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill("secret")
        _run(page, "object-detection")
        assert len(_row_labels(page)) == 3
        for tab in page.get_by_role("tab").all():
            tab.click()
            assert "secret" not in (page.locator("#code").text_content() or "")


# --- code to copy


def _copied_code(page: Page, language: str) -> str:
    page.get_by_role("tab", name=language, exact=True).click()
    page.click("#copy-code")
    expect(page.locator("#status")).to_have_text("Copied.")
    code: str = page.evaluate("navigator.clipboard.readText()")
    page.locator("#status").evaluate("status => { status.textContent = ''; }")
    return code


@pytest.mark.parametrize("language", ["Python", "Python, no server", "JavaScript", "curl"])
def test_the_code_has_the_endpoint_and_the_arguments(page: Page, server: LiveServer, language: str) -> None:
    page.select_option("#task", "region-to-description")
    for name, value in RED_CIRCLE.items():
        page.fill(f"#{name}", str(value))
    code = _copied_code(page, language)
    assert f"{PREFIX}/region-to-description" in code
    assert "scene-1.png" in code
    assert '{"x1": 430, "y1": 364, "x2": 592, "y2": 539}' in code
    assert (f"{server.url}/" in code) == (language != "Python, no server")


TRICKY = 'a "red" circle, $HOME `date` \\n it\'s Ünïcode'


def test_the_curl_command_works(page: Page, server: LiveServer, tmp_path: Path) -> None:
    """With a file name and a text that need quoting in a shell."""
    if not (shutil.which("curl") and shutil.which("bash")):
        pytest.skip("needs curl and bash")
    image = tmp_path / "it's $one.png"
    image.write_bytes((SAMPLES / "scene-1.png").read_bytes())
    page.set_input_files("#file", image)
    expect(page.locator("#image-name")).to_contain_text("it's $one.png")
    page.select_option("#task", "caption-to-phrase-grounding")
    page.fill("#text", TRICKY)
    command = _copied_code(page, "curl")
    sent = json.loads(_run_in_bash("curl() { cat; }\n" + command, tmp_path))
    assert sent["text_input"] == TRICKY
    assert base64.b64decode(sent["image_url"].removeprefix("data:image/png;base64,")) == image.read_bytes()
    direct = _post(server, "caption-to-phrase-grounding", image, text_input=TRICKY)
    assert json.loads(_run_in_bash(command, tmp_path))["results"] == direct["results"]


def _run_in_bash(command: str, folder: Path) -> bytes:
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, timeout=60, check=True).stdout


def test_the_python_code_works(page: Page, server: LiveServer) -> None:
    pytest.importorskip("fal_client", reason="needs fal's client: pip install fal-client")
    page.select_option("#task", "open-vocabulary-detection")
    page.fill("#text", 'red "circle" \\')
    run = subprocess.run(
        [sys.executable, "-c", _copied_code(page, "Python")], cwd=SAMPLES, capture_output=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr.decode()
    direct = _post(server, "open-vocabulary-detection", SAMPLES / "scene-1.png", text_input='red "circle" \\')
    assert run.stdout.decode().strip() == str(direct["results"])


def test_the_javascript_code_is_valid(page: Page, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node: apt-get install nodejs")
    page.select_option("#task", "open-vocabulary-detection")
    page.fill("#text", TRICKY)
    program = tmp_path / "ask.mjs"
    program.write_text(_copied_code(page, "JavaScript"), encoding="utf-8")
    run = subprocess.run([node, "--check", program], capture_output=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr.decode()


# --- layout and accessibility


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_overflows_at_any_width_and_scheme(open_page: Callable[..., Page], scheme: str, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 740}, color_scheme=scheme)
    for slug in ("object-detection", "open-vocabulary-detection", "region-to-segmentation"):
        page.select_option("#task", slug)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, slug
    page.select_option("#task", "object-detection")
    _run(page, "object-detection")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (_luminance(_style(page, "body", "backgroundColor")) > 0.5) == (scheme == "light")
    for selector in ("#task-hint", "#result .label", "#result .place", "#status", "#json .string", "#run"):
        assert _contrast(page, selector) >= 4.5, selector


def _style(page: Page, selector: str, name: str) -> str:
    value: str = page.locator(selector).first.evaluate("(element, name) => getComputedStyle(element)[name]", name)
    return value


def _contrast(page: Page, selector: str) -> float:
    """WCAG's contrast ratio of a text and its background."""
    behind = page.locator(selector).first.evaluate(
        """element => {
            while (getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
            return getComputedStyle(element).backgroundColor;
        }"""
    )
    dark, light = sorted([_luminance(_style(page, selector, "color")), _luminance(behind)])
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("slug", ["object-detection", "open-vocabulary-detection", "region-to-category"])
def test_every_control_has_a_name(page: Page, slug: str) -> None:
    page.select_option("#task", slug)
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    interactive = {"button", "textbox", "combobox", "spinbutton", "checkbox", "tab", "link", "option", "image"}
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in interactive]
    assert len(controls) > 20
    assert [node for node in controls if not node.get("name", {}).get("value", "").strip()] == []


def test_the_page_tells_a_screen_reader_what_happens(page: Page) -> None:
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").count() == 1
    expect(page.get_by_role("status")).to_have_text("scene-1.png is ready.")
    expect(page.get_by_role("tab", selected=True)).to_have_text("Python")
    expect(page.get_by_role("tabpanel", name="Python")).to_be_visible()
    page.select_option("#task", "region-to-category")
    page.click("#run")
    expect(page.get_by_role("alert")).to_contain_text("Draw a region")
    expect(page.get_by_role("group", name="Region")).to_be_visible()


def test_all_tasks_can_be_chosen(page: Page) -> None:
    options: Locator = page.locator("#task option")
    values = options.evaluate_all("all => all.map(option => option.value)")
    assert sorted(values) == sorted([*TASKS, "detect-a-list"])


# --- scores, a list of classes, parts as they come


def test_boxes_of_a_low_score_are_hidden_by_the_slider(page: Page) -> None:
    expect(page.locator("#cut-field")).to_be_hidden()
    _run(page, "object-detection")
    titles = page.locator(".row .score").evaluate_all("all => all.map(each => each.title)")
    scores = [float(title.removeprefix("Score ")) for title in titles]
    assert len(scores) == 3 and 0 < min(scores) < max(scores)
    slider = page.get_by_label("Least score")
    expect(slider).to_have_value("0")
    between = sum(sorted(scores)[:2]) / 2
    slider.evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }",
        between,
    )
    expect(page.locator(".row")).to_have_count(2)
    expect(page.locator("#overlay .shape")).to_have_count(2)
    expect(page.locator("#cut-value")).to_have_text(f"{between:.3f}: 2 of 3")
    assert json.loads(page.locator("#json").text_content() or "")["results"]["bboxes"][2], "the JSON stays whole"
    slider.press("Home")
    expect(page.locator(".row")).to_have_count(3)
    _run(page, "caption")
    expect(page.locator("#cut-field")).to_be_hidden()


def test_a_list_of_classes_is_detected(page: Page, server: LiveServer) -> None:
    page.select_option("#task", "detect-a-list")
    field = page.get_by_label("Classes")
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text("at least one class")
    field.fill("red circle, yellow diamond\n\nblue star,")
    with page.expect_request(f"**/{PREFIX}/open-vocabulary-detection/stream") as request:
        page.click("#run")
    assert request.value.post_data_json["classes"] == ["red circle", "yellow diamond", "blue star"]
    expect(page.locator("#status")).to_have_text(_starting_with("Done"))
    expected = _post(
        server,
        "open-vocabulary-detection",
        SAMPLES / "scene-1.png",
        classes=["red circle", "yellow diamond", "blue star"],
    )
    labels = [box["label"] for box in expected["results"]["bboxes"]]
    assert _row_labels(page) == labels and "red circle" in labels
    absent = {"red circle", "yellow diamond", "blue star"} - set(labels)
    assert absent
    for name in absent:
        expect(page.locator(".absent")).to_contain_text(name)
    page.get_by_role("tab", name="curl").click()
    expect(page.locator("#code")).to_contain_text('"classes": ["red circle","yellow diamond","blue star"]')


def test_boxes_are_drawn_as_they_come(page: Page) -> None:
    """Two parts of an answer, and no more: their boxes are drawn while the request is still running, and go with it."""
    box = {"x": 10, "y": 10, "w": 40, "h": 40, "label": "kite"}
    script = """
        ([first, second]) => {
            const parts = [first, second].map((item, index) => `data: ${JSON.stringify({part: "box", index, item})}\\n\\n`);
            window.fetch = async (url, {signal}) => {
                const body = new ReadableStream({
                    start(controller) {
                        for (const part of parts) controller.enqueue(new TextEncoder().encode(part));
                        signal.addEventListener("abort", () => controller.error(new DOMException("", "AbortError")));
                    },
                });
                return new Response(body, {status: 200, headers: {"content-type": "text/event-stream"}});
            };
        }
    """
    _run(page, "object-detection")
    page.evaluate(script, [box, {**box, "x": 80, "label": "plane"}])
    page.click("#run")
    expect(page.locator("#status")).to_have_text("2 found so far …")
    expect(page.locator("#overlay .shape")).to_have_count(2)
    assert set(_drawn_boxes(page).values()) == {(10, 10, 50, 50), (80, 10, 120, 50)}
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(page.locator("#overlay .shape")).to_have_count(3)
