"""Names of `EncodedImage` and `Prediction` that were renamed still work, and warn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from florence_onnx import EncodedImage, Prediction, tasks

IMAGE = Image.new("RGB", (4, 3))


@pytest.mark.parametrize(
    "value",
    [
        EncodedImage(np.zeros((2, 3), dtype=np.float32), IMAGE),
        Prediction("a cat", tasks.CAPTION, "</s><s>a cat</s>", (2, 0, 5, 2), False, IMAGE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_picture_is_the_deprecated_name_of_source_image(value: EncodedImage | Prediction[str]) -> None:
    name = type(value).__name__
    with pytest.warns(
        DeprecationWarning, match=rf"{name}\.picture has been renamed: use {name}\.source_image"
    ) as caught:
        assert value.picture is value.source_image is IMAGE
    assert Path(caught[0].filename) == Path(__file__), "the warning points to the caller"
