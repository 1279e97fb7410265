"""fal's unmodified clients against our server: Python over https and http, JavaScript, curl; and fuzzing by the OpenAPI document."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fal_client", reason="pip install -e '.[test]'")
pytest.importorskip("fastapi", reason="pip install -e '.[serve]'")

from florence_onnx import fal, tasks
from tests.fal.test_fal import APP, REGION, SAMPLE, arguments
from tests.live_server import LiveServer, serve

ROOT = Path(__file__).parents[2]
NODE_FOLDER = ROOT / "tests" / ".node"
NO_NODE = "needs Node and fal's client: mkdir -p tests/.node && cd tests/.node && npm install @fal-ai/client@1"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CAPTION = {"results": "Two circles, a star and the word ROCKET."}
KEY = "id:secret"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve("--images", "data", "--grace", "1", "--api-key", KEY, environment=ONE_THREAD) as running:
        yield running


def other_arguments() -> dict[str, dict[str, Any]]:
    """The arguments of each endpoint besides `image_url`."""
    return {
        task.slug: {name: value for name, value in arguments(task).items() if name != "image_url"}
        for task in tasks.TASKS.values()
    }


def run_python(code: str, environment: dict[str, str], *arguments_given: str) -> Any:
    """Runs a script in another process and returns the JSON that it prints."""
    command = [sys.executable, "-c", code, *arguments_given]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "FAL_KEY": KEY, **environment}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --------------------------------------------------------------------------------------------------- Python, unmodified

_OVER_TLS = """
import json, sys, fal_client
app, image, endpoints = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
url = fal_client.encode_file(image)
found = {slug: fal_client.run(f"{app}/{slug}", arguments={"image_url": url, **more}) for slug, more in endpoints.items()}
updates = []
found["subscribed"] = fal_client.subscribe(f"{app}/caption", arguments={"image_url": url}, with_logs=True, on_queue_update=updates.append)
found["updates"] = [type(update).__name__ for update in updates]
found["logs"] = [line["message"] for line in updates[-1].logs]
handle = fal_client.submit(f"{app}/caption", arguments={"image_url": url})
found["submitted"] = handle.get()
found["status"] = type(fal_client.status(f"{app}/caption", handle.request_id)).__name__
found["result"] = fal_client.result(f"{app}/caption", handle.request_id)
try:
    fal_client.run(f"{app}/caption", arguments={})
except fal_client.FalClientHTTPError as error:
    found["error"] = [error.status_code, error.message[0]["loc"], error.response_headers["x-fal-request-id"] != ""]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    trustme = pytest.importorskip("trustme", reason="pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    for name, blobs in (("cert.pem", issued.cert_chain_pems), ("key.pem", [issued.private_key_pem])):
        (folder / name).write_bytes(b"".join(blob.bytes() for blob in blobs))
    (folder / "ca.pem").write_bytes(authority.cert_pem.bytes())
    return folder / "cert.pem", folder / "key.pem"


def test_the_unmodified_client_over_tls_by_environment_alone(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    trust = str(cert.with_name("ca.pem"))
    options = (
        "--certificate",
        str(cert),
        "--private-key",
        str(key),
        "--api-key",
        KEY,
        "--grace",
        "1",
        "--images",
        "data",
    )
    with serve(*options, environment=ONE_THREAD, authority=trust) as running:
        host = f"127.0.0.1:{running.port}"
        environment = {"FAL_RUN_HOST": host, "FAL_QUEUE_RUN_HOST": f"{host}/queue", "SSL_CERT_FILE": trust}
        found = run_python(_OVER_TLS, environment, APP, str(SAMPLE), json.dumps(other_arguments()))
    fal.configure("demo", device="cpu")
    for task in tasks.TASKS.values():
        assert found[task.slug] == fal.run(f"{APP}/{task.slug}", arguments(task)), task.slug
    assert found["subscribed"] == found["submitted"] == found["result"] == CAPTION
    assert (found["updates"][-1], found["status"]) == ("Completed", "Completed")
    assert found["logs"][0] == "started"
    assert found["error"] == [422, ["body", "image_url"], True]


_OVER_HTTP = """
import asyncio, json, sys, fal_client, fal_client.client as client
base, app, image = sys.argv[1:]
client.RUN_URL_FORMAT, client.QUEUE_URL_FORMAT = f"{base}/", f"{base}/queue/"
client.REST_URL = client.CDN_URL = base
found = {"uploaded": fal_client.upload_file(image), "fallback": fal_client.upload_file(image, repository="fal")}
for name in ("uploaded", "fallback"):
    found[name + " answer"] = fal_client.run(f"{app}/caption", arguments={"image_url": found[name]})
async def twins():
    handle = await fal_client.submit_async(f"{app}/caption", arguments={"image_url": found["uploaded"]})
    states = [type(state).__name__ async for state in handle.iter_events(with_logs=True)]
    answer = await handle.get()
    try:
        await fal_client.cancel_async(f"{app}/caption", handle.request_id)
    except fal_client.FalClientHTTPError as error:
        return states, answer, error.status_code
found["twins"] = asyncio.run(twins())
try:
    fal_client.run(f"{app}/nothing", arguments={})
except fal_client.FalClientHTTPError as error:
    found["404"] = [error.status_code, error.message]
try:
    fal_client.SyncClient(key="id:wrong").run(f"{app}/caption", arguments={})
except fal_client.FalClientHTTPError as error:
    found["401"] = [error.status_code, error.message]
print(json.dumps(found))
"""


def test_the_client_over_http_with_uploads(server: LiveServer) -> None:
    found = run_python(_OVER_HTTP, {}, server.url, APP, str(SAMPLE))
    assert found["uploaded"].startswith(f"{server.url}/files/") and found["uploaded"].endswith("/scene-1.png")
    assert found["uploaded answer"] == found["fallback answer"] == CAPTION
    states, answer, status = found["twins"]
    assert (states[-1], answer, status) == ("Completed", CAPTION, 400)
    assert found["404"] == [404, f"Path /{APP}/nothing not found"]
    assert found["401"] == [401, "No user found for Key ID and Secret"]


# ----------------------------------------------------------------------------------------------------------- JavaScript

_JAVASCRIPT = """
import { readFileSync } from "node:fs";
import { createFalClient, ValidationError } from "@fal-ai/client";
const [base, app, image, region, endpoints] = process.argv.slice(2);
const hosts = { "fal.run": "", "queue.fal.run": "/queue", "rest.fal.ai": "", "rest.alpha.fal.ai": "" };
const redirected = createFalClient({
  credentials: "id:secret",
  requestMiddleware: async (request) => {
    const url = new URL(request.url);
    return { ...request, url: base + hosts[url.hostname] + url.pathname + url.search };
  },
});
const proxied = createFalClient({ credentials: "id:secret", proxyUrl: { url: base + "/proxy", when: "always" } });
const image_url = "data:image/png;base64," + readFileSync(image).toString("base64");
const found = {};
found.run = await redirected.run(`${app}/object-detection`, { input: { image_url } });
found.all = {};
for (const [slug, more] of Object.entries(JSON.parse(endpoints))) {
  const answer = await redirected.subscribe(`${app}/${slug}`, { input: { image_url, ...more }, logs: true, pollInterval: 20 });
  found.all[slug] = answer.data;
}
for (const mode of ["polling", "streaming"]) {
  const states = [];
  const answer = await redirected.subscribe(`${app}/region-to-category`, {
    input: { image_url, region: JSON.parse(region) }, mode, logs: true, onQueueUpdate: (update) => states.push(update.status),
  });
  found[mode] = { answer, last: states.at(-1) };
}
found.blob = await redirected.run(`${app}/caption`, { input: { image_url: new Blob([readFileSync(image)], { type: "image/png" }) } });
found.proxied = await proxied.run(`${app}/caption`, { input: { image_url } });
try {
  await redirected.run(`${app}/caption`, { input: {} });
} catch (error) {
  found.error = [error instanceof ValidationError, error.status, error.fieldErrors.map((each) => each.loc)];
}
const { request_id } = await redirected.queue.submit(`${app}/caption`, { input: { image_url } });
await redirected.queue.subscribeToStatus(`${app}/caption`, { requestId: request_id });
found.result = await redirected.queue.result(`${app}/caption`, { requestId: request_id });
console.log(JSON.stringify(found));
"""


def run_node(script: str, *arguments_given: str) -> Any:
    """Runs a script with Node and returns the JSON that it prints."""
    if shutil.which("node") is None or not (NODE_FOLDER / "node_modules" / "@fal-ai" / "client").is_dir():
        pytest.skip(NO_NODE)
    command = ["node", "--input-type=module", "-", *arguments_given]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=120, cwd=NODE_FOLDER)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_javascript_client(server: LiveServer) -> None:
    found = run_node(_JAVASCRIPT, server.url, APP, str(SAMPLE), json.dumps(REGION), json.dumps(other_arguments()))
    fal.configure("demo", device="cpu")
    expected = {task.slug: fal.run(f"{APP}/{task.slug}", arguments(task)) for task in tasks.TASKS.values()}
    assert found["all"] == expected
    assert found["run"]["data"] == expected["object-detection"]
    assert len(found["run"]["requestId"]) == 36
    for mode in ("polling", "streaming"):
        assert found[mode]["answer"]["data"] == expected["region-to-category"]
        assert found[mode]["last"] == "COMPLETED"
    assert found["blob"]["data"] == found["proxied"]["data"] == found["result"]["data"] == CAPTION
    assert found["error"] == [True, 422, [["body", "image_url"]]]


# ----------------------------------------------------------------------------------------------------------------- curl


_CURL = r"""
set -eu
for slug in $SLUGS; do
  response=$(curl -sS --request POST --url "$BASE/queue/$APP/$slug" \
    --header "Authorization: Key $FAL_KEY" --header "Content-Type: application/json" --data "@$FOLDER/$slug.json")
  REQUEST_ID=$(echo "$response" | grep -o '"request_id": *"[^"]*"' | sed 's/"request_id": *//; s/"//g')
  until curl -sS --url "$BASE/queue/$APP/requests/$REQUEST_ID/status" --header "Authorization: Key $FAL_KEY" \
    | grep -q COMPLETED; do sleep 0.05; done
  curl -sS --url "$BASE/queue/$APP/requests/$REQUEST_ID" --header "Authorization: Key $FAL_KEY" > "$FOLDER/$slug.queued"
  curl -sS --request POST --url "$BASE/$APP/$slug" \
    --header "Authorization: Key $FAL_KEY" --header "Content-Type: application/json" --data "@$FOLDER/$slug.json" > "$FOLDER/$slug.direct"
done
"""


def test_curl_on_every_endpoint(server: LiveServer, tmp_path: Path) -> None:
    """The commands of fal's documentation: submit, status and result through the queue; and direct."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    for task in tasks.TASKS.values():
        (tmp_path / f"{task.slug}.json").write_text(json.dumps(arguments(task)))
    variables = {
        "SLUGS": " ".join(tasks.TASKS),
        "BASE": server.url,
        "APP": APP,
        "FAL_KEY": KEY,
        "FOLDER": str(tmp_path),
    }
    subprocess.run(["bash", "-c", _CURL], check=True, timeout=120, env={**os.environ, **variables})
    fal.configure("demo", device="cpu")
    for task in tasks.TASKS.values():
        expected = fal.run(f"{APP}/{task.slug}", arguments(task))
        for way in ("queued", "direct"):
            assert json.loads((tmp_path / f"{task.slug}.{way}").read_text()) == expected, (task.slug, way)


# ----------------------------------------------------------------------------------------------------------------- fuzz


_SUBMIT = "^/queue/.*2-large/[a-z-]+$"
_LEFT_OUT = f"{_SUBMIT}|(?<!object-detection)/stream$"
"""All streams read their fields by the same code, so one of them is enough."""


@pytest.mark.parametrize(
    ("which", "left_out"),
    [
        (["--exclude-path-regex", _LEFT_OUT], "positive_data_acceptance"),
        (["--include-path-regex", _SUBMIT], "positive_data_acceptance,negative_data_rejection"),
    ],
    ids=["all but submit", "submit"],
)
def test_the_openapi_document_holds_under_fuzzing(
    which: list[str], left_out: str, server: LiveServer, tmp_path: Path
) -> None:
    """schemathesis makes requests from the document, right and wrong ones, and compares the answers with it.

    `positive_data_acceptance` is left out: a random string is a valid `image_url` to the schema, and no image. For the
    queue, `negative_data_rejection` too: as at fal, wrong arguments are accepted, and fail the request.
    """
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *which]
    command += ["--header", f"Authorization: Key {KEY}", "--max-examples", "8", "--phases", "examples,coverage,fuzzing"]
    command += ["--exclude-checks", left_out, "--seed", "1", "--no-color"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )  # schemathesis writes a cache into it
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
