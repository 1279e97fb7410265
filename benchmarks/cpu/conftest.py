"""Options and fixtures of `bench_stages.py`: the bundle and the image that are timed."""

from __future__ import annotations

import pytest
from PIL import Image

from florence_onnx import Florence2
from florence_onnx.bundles.bundle import DEMO, DEMO_DIRECTORY
from florence_onnx.images import decoding
from florence_onnx.prediction import EncodedImage


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bundle", default=DEMO, help="bundle directory, hub repository or demo")
    parser.addoption("--image", default=str(DEMO_DIRECTORY.parent / "samples" / "scene-1.png"), help="the image")
    parser.addoption("--device", default="cpu", help="device of the model")
    parser.addoption("--threads", type=int, default=0, help="threads of ONNX Runtime; 0 means its own choice")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """No workers, of which the tests have one for each core: what is timed runs alone."""
    return 0


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> Florence2:
    bundle, device, threads = (request.config.getoption(f"--{name}") for name in ("bundle", "device", "threads"))
    return Florence2.from_pretrained(bundle, device=device, session_options={"intra_op_num_threads": threads})


@pytest.fixture(scope="session")
def image(request: pytest.FixtureRequest) -> Image.Image:
    return decoding.load(request.config.getoption("--image"))


@pytest.fixture(scope="session")
def encoded(model: Florence2, image: Image.Image) -> EncodedImage:
    return model.encode(image)
