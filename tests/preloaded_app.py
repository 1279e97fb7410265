"""A WSGI application that has used fal's client before gunicorn forks: `gunicorn --preload tests.preloaded_app:app`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from florence_onnx import fal, tasks

SAMPLE = Path(tasks.__file__).parent / "demo" / "samples" / "scene-1.png"
fal.configure("demo", device="cpu", images=False, max_batch=4, session_options={"intra_op_num_threads": 2})
ARGUMENTS = {"image_url": fal.encode_file(SAMPLE)}
APPLICATION = "fal-ai/florence-2-large/object-detection"
BEFORE_THE_FORK = fal.run(APPLICATION, ARGUMENTS)


def app(environment: Any, start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answers with whether a worker finds what was found before the fork."""
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(fal.run(APPLICATION, ARGUMENTS) == BEFORE_THE_FORK).encode()]
