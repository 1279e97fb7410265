"""This runtime, on a bundle or on the layout of transformers.js."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.cpu.jobs import Job, Prompt
from benchmarks.cpu.peers.protocol import UnavailableError
from florence_onnx import Florence2, GenerationOptions, tasks
from florence_onnx.errors import MissingExtraError, ProviderError
from florence_onnx.images import decoding, preprocessing
from florence_onnx.prediction import EncodedImage

Features = npt.NDArray[np.float32]


class OnnxRunner:
    """Runs `Florence2` stage by stage."""

    keeps_features = True

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model: Florence2
        self._image: Image.Image

    def load(self) -> None:
        try:
            self._model = self._load()
        except (ProviderError, MissingExtraError) as error:
            raise UnavailableError(str(error)) from error
        self._sizes = self._model._bundle.sizes

    def _load(self) -> Florence2:
        return Florence2.from_pretrained(
            Path(self._job.model),
            device=self._job.peer.options.get("device", "cpu"),
            session_options={"intra_op_num_threads": self._job.workload.threads},
        )

    def preprocess(self, image: str) -> Features:
        self._image = decoding.load(image)
        sizes = self._sizes
        return preprocessing.preprocess(self._image, size=sizes.image_size, mean=sizes.image_mean, std=sizes.image_std)

    def vision(self, pixel_values: Features) -> Features:
        return self._model._vision_encoder.run({"pixel_values": pixel_values})["image_features"]

    def encode_text(self, features: Features, prompt: Prompt) -> None:
        input_ids, attention_mask = self._model._tokenizer.encode([prompt.text])
        self._model._text_model.start(input_ids, attention_mask, features)

    def answer(self, features: Features, prompt: Prompt, num_beams: int, num_tokens: int) -> list[int]:
        options = GenerationOptions(**self._job.workload.options(num_beams, num_tokens))
        encoded = EncodedImage(features[0], self._image)
        prediction = self._model.run(tasks.get(prompt.task), encoded, options=options)
        return list(prediction.token_ids[1:])

    def describe(self) -> dict[str, Any]:
        import onnxruntime

        import florence_onnx

        versions = {"florence_onnx": florence_onnx.__version__, "onnxruntime": onnxruntime.__version__}
        return {"versions": versions, "notes": []}


def create(job: Job) -> OnnxRunner:
    """See `protocol.Factory`."""
    return OnnxRunner(job)
