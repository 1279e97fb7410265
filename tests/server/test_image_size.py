"""A server that reads images at another size, with margins."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

httpx = pytest.importorskip("httpx", reason="pip install -e '.[test]'")
for needed in ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger"):
    pytest.importorskip(needed, reason="pip install -e '.[serve]'")

from florence_onnx import Florence2, tasks  # noqa: E402
from tests.conftest import Exported  # noqa: E402
from tests.fal.test_fal import APP, SAMPLE, arguments  # noqa: E402
from tests.live_server import ServerFailedError, serve  # noqa: E402


def test_requests_are_answered_at_the_servers_size(sized: Exported) -> None:
    model = Florence2.from_pretrained(sized.bundle, device="cpu")
    image: Any = Image.open(SAMPLE)
    expected, other = (
        model.run(tasks.CAPTION, image, image_size=size, fit="pad").results for size in ((160, 96), (128, 128))
    )
    options = ("--model", str(sized.bundle), "--image-size", "160x96", "--fit", "pad", "--grace", "1")
    with (
        serve(*options, environment={"OMP_NUM_THREADS": "1"}) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        assert client.post(f"/{APP}/caption", json=arguments(tasks.CAPTION)).json() == {"results": expected}
    assert expected != other


def test_a_size_that_the_model_lacks_ends_a_server_at_once() -> None:
    with (
        pytest.raises(ServerFailedError, match="reads images of 128x128 pixels, not 64x64"),
        serve("--image-size", "64"),
    ):
        pass
