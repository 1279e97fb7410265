"""A model's own tasks on every outer surface: the server and its page, fal's queue, the command line. MCP: tests/mcp_server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from florence_onnx import Florence2, fal, tasks
from florence_onnx.commands.main import app as command_line
from tests.live_server import LiveServer, serve
from tests.own_tasks import REGION, SAME_AS, TOKENS, copy_demo

httpx = pytest.importorskip("httpx", reason="pip install -e '.[test]'")
for needed in ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger"):
    pytest.importorskip(needed, reason="pip install -e '.[serve]'")

from florence_onnx.server.middleware import endpoint_of  # noqa: E402

APP = "fal-ai/florence-2-large"
SAMPLE = Path(tasks.__file__).parent / "demo" / "samples" / "scene-1.png"
BINS = {"x1": REGION.x1, "y1": REGION.y1, "x2": REGION.x2, "y2": REGION.y2}
OUTPUTS = {
    "find-shapes": "BoundingBoxOutputWithLabels",
    "find-phrases": "BoundingBoxOutputWithLabels",
    "outline": "PolygonOutputWithLabels",
    "ask-region": "TextOutput",
    "read-lines": "OCRBoundingBoxOutputWithLabels",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_demo(tmp_path_factory.mktemp("own-tasks") / "bundle")


@pytest.fixture(scope="module")
def model(bundle: Path) -> Florence2:
    return Florence2.from_pretrained(bundle, device="cpu", session_options={"intra_op_num_threads": 1})


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[LiveServer]:
    with serve("--grace", "1", "--images", "none", model=str(bundle), environment={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def arguments(slug: str) -> dict[str, Any]:
    """fal's arguments of an own task."""
    given = dict(SAME_AS[slug][1])
    if "region" in given:
        given["region"] = BINS
    return {"image_url": fal.encode_file(SAMPLE), **given}


def expected(model: Florence2, slug: str) -> dict[str, Any]:
    """What fal's JSON must have: the answer of Florence-2's task with the same prompt."""
    same, _, given = SAME_AS[slug]
    return model.run(same, SAMPLE, **given).to_dict()


# -------------------------------------------------------------------------------------------------------------- server


@pytest.mark.parametrize("slug", SAME_AS)
def test_every_own_task_has_an_endpoint(client: Any, model: Florence2, slug: str) -> None:
    response = client.post(f"/{APP}/{slug}", json=arguments(slug))
    assert response.status_code == 200 and response.json() == expected(model, slug)


def test_own_tasks_go_through_fals_queue(client: Any, model: Florence2) -> None:
    for slug in ("find-shapes", "ask-region"):
        submitted = client.post(f"/queue/{APP}/{slug}", json=arguments(slug)).json()
        path = submitted["response_url"].partition("/queue/")[2]
        client.get(f"/queue/{path}/status/stream")  # ends when the request does
        assert (
            client.get(f"/queue/{APP}/{slug}/requests/{submitted['request_id']}/status").json()["status"] == "COMPLETED"
        )
        assert client.get(f"/queue/{path}").json() == expected(model, slug)


def test_own_tasks_answer_fals_calls_in_process(model: Florence2) -> None:
    fal.configure(model, images=False)
    try:
        for slug in SAME_AS:
            assert fal.run(f"{APP}/{slug}", arguments(slug)) == expected(model, slug)
        assert fal.subscribe(f"{APP}/find-shapes", arguments("find-shapes")) == expected(model, "find-shapes")
        assert fal.submit(f"{APP}/outline", arguments("outline")).get() == expected(model, "outline")
    finally:
        fal.configure()


@pytest.mark.parametrize(
    ("slug", "given", "loc", "kind"),
    [
        ("find-phrases", {}, ["body", "text_input"], "missing"),
        ("outline", {}, ["body", "region"], "missing"),
        ("ask-region", {"region": BINS}, ["body", "text_input"], "missing"),
        ("ask-region", {"text_input": "What is", "region": {"x1": 1}}, ["body", "region", "y1"], "missing"),
        ("outline", {"region": "<loc_5>"}, ["body", "region"], "value_error"),
    ],
)
def test_wrong_arguments_of_own_tasks_are_named(
    client: Any, slug: str, given: dict[str, Any], loc: list[str], kind: str
) -> None:
    response = client.post(f"/{APP}/{slug}", json={"image_url": fal.encode_file(SAMPLE), **given})
    assert response.status_code == 422
    assert (loc, kind) in [(error["loc"], error["type"]) for error in response.json()["detail"]]


@pytest.mark.parametrize("slug", ["region-to-category", "outline"])
def test_a_region_may_be_location_tokens(client: Any, slug: str) -> None:
    url = fal.encode_file(SAMPLE)
    answers = [
        client.post(f"/{APP}/{slug}", json={"image_url": url, **given}).json()
        for given in ({"region": BINS}, {"region": TOKENS}, {"text_input": TOKENS})
    ]
    assert "results" in answers[0] and answers[0] == answers[1] == answers[2]


def test_the_openapi_document_has_own_tasks(client: Any) -> None:
    document = client.get("/openapi.json").json()
    for slug, output in OUTPUTS.items():
        described = document["paths"][f"/{APP}/{slug}"]["post"]
        assert described["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{output}")
        assert f"/queue/{APP}/{slug}" in document["paths"]
    assert document["paths"][f"/{APP}/find-shapes"]["post"]["description"] == "Finds drawn shapes."
    both = document["components"]["schemas"]["ImageWithTextAndUserCoordinatesInput"]
    assert both["required"] == ["image_url", "text_input", "region"]


def test_only_known_slugs_are_labels_of_the_metrics(client: Any) -> None:
    client.post(f"/{APP}/find-shapes", json=arguments("find-shapes"))
    client.post(f"/{APP}/no-such-task", json={})
    metrics = client.get("/metrics").text
    assert 'endpoint="find-shapes"' in metrics and "no-such-task" not in metrics
    assert endpoint_of(f"/{APP}/find-shapes") == "unknown"


def test_a_server_of_another_model_has_no_such_endpoint(model: Florence2) -> None:
    service = fal.service.Service(Florence2.from_pretrained("demo", device="cpu"))
    try:
        with pytest.raises(fal.problems.RequestError, match="find-shapes"):
            service.submit(f"{APP}/find-shapes", arguments("find-shapes"))
    finally:
        service.close()


# ---------------------------------------------------------------------------------------------------------------- page


@pytest.fixture(scope="module")
def page(server: LiveServer) -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    from tests.server.test_playground import CHROMIUM

    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    errors: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.goto(server.url)
        api.expect.set_options(timeout=20_000)
        api.expect(opened.locator("#image-name")).to_contain_text("scene-1.png")
        yield opened
        browser.close()
    assert errors == []


def test_the_page_lists_own_tasks_in_a_group(page: Any) -> None:
    group = page.locator('#task optgroup[label="Of this model"] option')
    assert group.evaluate_all("all => all.map(option => option.value)") == list(SAME_AS)
    assert page.locator("#task option").count() == len(tasks.TASKS) + len(SAME_AS) + 1  # a list of classes
    page.select_option("#task", "find-shapes")
    assert page.locator("#task-hint").text_content() == "Finds drawn shapes. Task token\u00a0<FIND_SHAPES>."
    page.select_option("#task", "read-lines")
    assert page.locator("#task-hint").text_content() == "A task of this model. Task token\u00a0<READ_LINES>."


@pytest.mark.parametrize("slug", SAME_AS)
def test_the_page_runs_own_tasks(page: Any, model: Florence2, slug: str) -> None:
    from playwright.sync_api import expect

    page.select_option("#task", slug)
    given = SAME_AS[slug][1]
    assert page.locator("#text-field").is_visible() == ("text_input" in given)
    assert page.locator("#region-field").is_visible() == ("region" in given)
    if "text_input" in given:
        page.fill("#text", given["text_input"])
    for name, value in BINS.items() if "region" in given else ():
        page.fill(f"#{name}", str(value))
    code = page.locator("#code").text_content()
    assert f"{APP}/{slug}" in code
    assert [name in code for name in ("text_input", "region")] == [name in given for name in ("text_input", "region")]
    page.evaluate("document.getElementById('status').textContent = ''")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("Done")
    assert json.loads(page.locator("#json").text_content()) == expected(model, slug)


def test_the_page_asks_for_both_inputs(page: Any) -> None:
    from playwright.sync_api import expect

    page.select_option("#task", "ask-region")
    page.fill("#text", " ")
    page.click("#run")
    expect(page.get_by_role("alert")).to_contain_text("needs a text")
    page.fill("#text", "What is")
    page.click("#region-clear")
    page.click("#run")
    expect(page.get_by_role("alert")).to_contain_text("Draw a region")


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def run(bundle: Path) -> Callable[..., Any]:
    from typer.testing import CliRunner

    def call(*given: str) -> Any:
        return CliRunner().invoke(command_line, list(given), terminal_width=160)

    return call


@pytest.mark.parametrize("slug", ["find-shapes", "<FIND_SHAPES>", "ask-region", "outline"])
def test_the_command_line_runs_own_tasks(run: Any, bundle: Path, model: Florence2, slug: str) -> None:
    plain = {"<FIND_SHAPES>": "find-shapes"}.get(slug, slug)
    given = SAME_AS[plain][1]
    options = [
        *(["--text", "What is"] if "text_input" in given else []),
        *(["--region", TOKENS] if "region" in given else []),
    ]
    done = run("run", slug, str(SAMPLE), "--model", str(bundle), "--json", *options)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["results"] == expected(model, plain)["results"]


def test_the_command_line_lists_own_tasks_and_presets(run: Any, bundle: Path) -> None:
    own = run("tasks", "--model", str(bundle)).stdout
    assert all(slug in own for slug in [*tasks.TASKS, *SAME_AS])
    assert "--text, --region" in own
    assert "find-shapes" not in run("tasks").stdout
    presets = run("tasks", "--presets").stdout
    assert (
        "promptgen-v2.0" in presets and "<MIXED_CAPTION_PLUS>" in presets and "thwri/CogFlorence-2.2-Large" in presets
    )


def test_an_unknown_task_names_own_tasks_before_graphs_are_loaded(run: Any, bundle: Path) -> None:
    done = run("run", "find-shape", str(SAMPLE), "--model", str(bundle))
    assert done.exit_code == 2 and 'did you mean "find-shapes"' in done.stderr
    assert run("run", "outline", str(SAMPLE), "--model", str(bundle)).exit_code == 2  # without its region


def test_the_command_line_runs_a_prompt_of_any_wording(run: Any, model: Florence2) -> None:
    tags = run("run", "--prompt", "<GENERATE_TAGS>", str(SAMPLE), "--json")
    assert tags.exit_code == 0, tags.output
    assert json.loads(tags.stdout)["results"] == model.run_prompt("<GENERATE_TAGS>", SAMPLE).results
    two = run("run", str(SAMPLE), str(SAMPLE.with_name("scene-2.png")), "--prompt", "<OD>", "--json")
    lines = [json.loads(line) for line in two.stdout.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["scene-1.png", "scene-2.png"]
    assert lines[0]["results"] == model.run("object-detection", SAMPLE).to_dict()["results"]
    region = run("run", "--prompt", f"<REGION_TO_CATEGORY>{TOKENS}", str(SAMPLE), "--json")
    assert json.loads(region.stdout)["results"] == model.run("region-to-category", SAMPLE, region=REGION).results


def test_the_command_line_reads_a_prompts_answer_with_a_parser(run: Any, model: Florence2, tmp_path: Path) -> None:
    given = ["run", "--prompt", tasks.OBJECT_DETECTION.prompt, str(SAMPLE), "--json"]
    read = run(*given, "--parser", "description_with_bboxes", "--draw", str(tmp_path))
    assert json.loads(read.stdout)["results"] == model.run("object-detection", SAMPLE).to_dict()["results"]
    assert [path.name for path in tmp_path.iterdir()] == ["scene-1.prompt.png"]
    assert isinstance(json.loads(run(*given).stdout)["results"], str)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--prompt", "<OD> cars", str(SAMPLE)], "must be the whole prompt"),
        (["--prompt", "<X>", "--parser", "xml", str(SAMPLE)], "unknown parser 'xml'; the parsers are: pure_text"),
        (["--prompt", "<X>", "--text", "cars", str(SAMPLE)], "takes no text_input"),
        (["caption", "--parser", "ocr", str(SAMPLE)], "--parser"),
        (["caption"], "at least one image"),
        (["region-to-category", str(SAMPLE), "--region", "<loc_1><loc_2>"], "four location tokens"),
    ],
)
def test_wrong_prompts_of_the_command_line(run: Any, given: list[str], said: str) -> None:
    done = run("run", *given)
    assert done.exit_code == 2 and said in done.stderr
