"""Generation options of a server and of its requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="pip install -e '.[test]'")
for needed in ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger"):
    pytest.importorskip(needed, reason="pip install -e '.[serve]'")

from florence_onnx import Choice, Florence2, GenerationOptions, OptionsError, fal, tasks  # noqa: E402
from florence_onnx.fal.service import Service, ServiceSettings  # noqa: E402
from florence_onnx.server import openapi  # noqa: E402
from tests.fal.test_fal import APP, SAMPLE, arguments  # noqa: E402
from tests.live_server import LiveServer, ServerFailedError, serve  # noqa: E402

ASKED = arguments(tasks.CAPTION)
SAMPLED = {**ASKED, "do_sample": True, "num_beams": 1, "temperature": 3.0, "seed": 5}
URL = f"/{APP}/caption"


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    options = ("--option", "max_new_tokens=6", "--option", "num_beams=1", "--allow-options")
    with serve("--grace", "1", *options, environment={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def caption(model: Florence2, **options: Any) -> str:
    return str(model.run(tasks.CAPTION, SAMPLE, options=GenerationOptions(**options)).results)


def test_a_server_has_options_of_its_own_and_requests_override_them(client: Any, model: Florence2) -> None:
    assert client.post(URL, json=ASKED).json() == {"results": caption(model, max_new_tokens=6, num_beams=1)}
    longer = {**ASKED, "max_new_tokens": 40, "something": 1}
    assert client.post(URL, json=longer).json() == {"results": caption(model, max_new_tokens=40, num_beams=1)}
    sampled = caption(model, do_sample=True, num_beams=1, temperature=3.0, seed=5, max_new_tokens=6)
    assert client.post(URL, json=SAMPLED).json() == {"results": sampled}


@pytest.mark.parametrize(
    ("given", "name", "said"),
    [
        ({"num_beams": 0}, "num_beams", "num_beams must be a whole number"),
        ({"seed": 3, "temperature": "hot"}, "temperature", "temperature must be a number"),
        ({"num_beam_groups": 2}, "num_beam_groups", "diverse beam search"),
        ({"num_return_sequences": 3}, "num_return_sequences", "greedy search finds one answer"),
        ({"constrain": {"boxes": {"labels": "car"}}}, "constrain", "labels must be a list of strings"),
        ({"constrain": "boxes"}, "constrain", "constrain must be a Grammar"),
    ],
)
def test_wrong_options_of_a_request_are_named(client: Any, given: dict[str, Any], name: str, said: str) -> None:
    response = client.post(URL, json={**ASKED, **given})
    assert response.status_code == 422
    (error,) = response.json()["detail"]
    assert error["loc"] == ["body", name] and said in error["msg"] and error["type"] == "value_error"


def test_the_document_has_the_options_where_requests_may_state_them(client: Any) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    fields = GenerationOptions.__dataclass_fields__
    for title in ("ImageInput", "ImageWithTextInput", "ImageWithUserCoordinatesInput"):
        assert set(fields) < set(schemas[title]["properties"]) and not set(fields) & set(schemas[title]["required"])
    properties = schemas["ImageInput"]["properties"]
    assert properties["do_sample"]["type"] == "boolean" and properties["top_p"]["type"] == "number"
    assert properties["num_beams"]["type"] == "integer"
    assert properties["bad_words_ids"]["items"]["items"]["type"] == "integer"
    plain = openapi.document()["components"]["schemas"]["ImageInput"]
    assert set(plain["properties"]) == {"image_url", "deadline", "scores", "min_score", "tiles"}
    assert plain["required"] == ["image_url"]


def test_requests_with_different_options_do_not_share_a_batch(client: Any, model: Florence2) -> None:
    from concurrent.futures import ThreadPoolExecutor

    lengths = [3, 9, 3, 5, 9, 5, 3, 9]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda n: client.post(URL, json={**ASKED, "max_new_tokens": n}).json()["results"], lengths)
        )
    expected = {n: caption(model, max_new_tokens=n, num_beams=1) for n in set(lengths)}
    assert found == [expected[n] for n in lengths]


def test_without_permission_options_in_requests_are_ignored_as_at_fal(model: Florence2) -> None:
    fal.configure(model, settings=ServiceSettings(options=GenerationOptions(max_new_tokens=6)))
    expected = {"results": caption(model, max_new_tokens=6)}
    assert fal.run(f"{APP}/caption", ASKED) == expected
    assert fal.run(f"{APP}/caption", {**SAMPLED, "max_new_tokens": 0, "num_beam_groups": 7}) == expected


def test_several_answers_are_in_the_extra_part(model: Florence2) -> None:
    service = Service(model, ServiceSettings(options=GenerationOptions(num_return_sequences=3)))
    answer = service.submit(f"{APP}/caption", ASKED).future.result(60)
    assert len(answer.extra["alternatives"]) == 2 and set(answer.body) == {"results"}
    service.close()


def test_options_that_the_model_cannot_have_end_a_server_at_once(model: Florence2) -> None:
    with pytest.raises(OptionsError, match="num_beams"):
        Service(model, ServiceSettings(options=GenerationOptions(num_beams=0)))
    with pytest.raises(ServerFailedError, match="no option 'beams'"), serve("--option", "beams=3"):
        pass


def test_requests_may_constrain_their_answers(client: Any) -> None:
    asked = {**ASKED, "constrain": {"choices": ["a star", "a kite"]}, "max_new_tokens": 20}
    assert client.post(URL, json=asked).json()["results"] in ("a star", "a kite")
    asked = {**arguments(tasks.OBJECT_DETECTION), "constrain": {"boxes": {"labels": ["kite"]}}, "min_new_tokens": 5}
    boxes = client.post(f"/{APP}/object-detection", json={**asked, "max_new_tokens": 9}).json()["results"]["bboxes"]
    assert [box["label"] for box in boxes] == ["kite"]


def test_the_scores_of_choices_are_in_the_extra_part(model: Florence2) -> None:
    service = Service(model, ServiceSettings(options=GenerationOptions(constrain=Choice(["a star", "a kite"]))))
    answer = service.submit(f"{APP}/caption", ASKED).future.result(60)
    assert set(answer.extra["choice_logprobs"]) == {"a star", "a kite"} and set(answer.body) == {"results"}
    service.close()
