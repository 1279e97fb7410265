"""transformers on PyTorch: fp32, bf16, and fp32 with a static cache and `torch.compile`.

`generate` is given the encoder's output, so that a second task need not run the vision encoder again. transformers does
not document this; it computes the same as `generate(pixel_values=…)`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.costs import Costs
from benchmarks.cpu.jobs import Job, Prompt
from benchmarks.cpu.peers.protocol import UnavailableError

MIN_BF16_SHARE = 0.2
"""Share of the fp32 rate below which bf16 counts as emulated."""


class PyTorchRunner:
    """Runs `Florence2ForConditionalGeneration` stage by stage."""

    keeps_features = True

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model: Any
        self._tokenizer: Any
        self._processor: Any
        self._is_compiled = bool(job.peer.options.get("compile"))
        self._notes: list[str] = []

    def load(self) -> None:
        import torch
        from transformers import CLIPImageProcessor, Florence2ForConditionalGeneration, PreTrainedTokenizerFast
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(self._job.workload.threads)
        self._torch = torch
        self._dtype = getattr(torch, self._job.peer.options["dtype"])
        self._check()
        folder = Path(self._job.model)
        self._model = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=self._dtype).eval()
        self._processor = CLIPImageProcessor.from_pretrained(folder)
        self._tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        if self._is_compiled:
            self._compile()

    def _check(self) -> None:
        """Checks that there is a compiler, and that the CPU has the arithmetic and does not emulate it."""
        if self._is_compiled and shutil.which("g++") is None and shutil.which("clang++") is None:
            raise UnavailableError("torch.compile needs a C++ compiler, and there is none")
        if self._dtype is not self._torch.bfloat16:
            return
        from benchmarks.cpu.rates import torch_rate

        threads = self._job.workload.threads
        rate, fp32 = (torch_rate(name, threads) for name in ("bfloat16", "float32"))
        if rate > MIN_BF16_SHARE * fp32:
            return
        costs = Costs.read(Path(self._job.checkpoint))
        seconds = costs.answer_flops(self._job.workload.num_tokens) / rate
        found = f"no bf16 arithmetic on this CPU (measured {rate / 1e9:.2g} GFLOP/s, estimated {seconds:.0f} s or more per answer)"
        if seconds > self._job.budget:
            raise UnavailableError(f"skipped: {found}; --all runs it anyway")
        self._notes.append(found)

    def _compile(self) -> None:
        """Compiles the encoders and the decoder; `generate` itself compiles on CUDA only."""
        # Every cache length and number of beams is a variant. Beyond this limit PyTorch silently runs uncompiled code.
        self._torch._dynamo.config.recompile_limit = 64
        model = self._model.model
        # Static shapes are all compiled after one warm-up; dynamic ones would go on recompiling.
        for part in (model.vision_tower, model.language_model.encoder, model.language_model.decoder):
            part.compile(dynamic=False)

    def preprocess(self, image: str) -> Any:
        from PIL import Image

        with Image.open(image) as opened:
            pixels = self._processor(opened.convert("RGB"), return_tensors="pt")["pixel_values"]
        self._check_size((pixels.shape[3], pixels.shape[2]))
        return pixels.to(self._dtype)

    def _check_size(self, size: tuple[int, int]) -> None:
        """Checks the image's size: CLIP's processor crops to 224 pixels unless the checkpoint forbids it."""
        expected = Costs.read(Path(self._job.checkpoint)).image_size
        if size != expected:
            raise UnavailableError(
                f"the checkpoint's preprocessor makes images of {size[0]} x {size[1]}, the model takes "
                f"{expected[0]} x {expected[1]}: set do_center_crop to false in its preprocessor_config.json"
            )

    def vision(self, pixel_values: Any) -> Any:
        with self._torch.inference_mode():
            return self._model.get_image_features(pixel_values)

    def encode_text(self, features: Any, prompt: Prompt) -> None:
        self._encode(features, prompt)

    def _encode(self, features: Any, prompt: Prompt) -> Any:
        torch = self._torch
        with torch.inference_mode():
            ids = torch.tensor([self._tokenizer(prompt.text)["input_ids"]])
            embeds = torch.cat([features, self._model.get_input_embeddings()(ids)], dim=1)
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
            return self._model.get_encoder()(inputs_embeds=embeds, attention_mask=mask), mask

    def answer(self, features: Any, prompt: Prompt, num_beams: int, num_tokens: int) -> list[int]:
        encoded, mask = self._encode(features, prompt)
        options = self._job.workload.options(num_beams, num_tokens)
        if self._is_compiled:
            options["cache_implementation"] = "static"
        with self._torch.inference_mode():
            tokens = self._model.generate(encoder_outputs=encoded, attention_mask=mask, do_sample=False, **options)
        return [int(token) for token in tokens[0, 1:]]

    def describe(self) -> dict[str, Any]:
        import torch
        import transformers

        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        return {"versions": versions, "notes": self._notes}


def create(job: Job) -> PyTorchRunner:
    """See `protocol.Factory`."""
    return PyTorchRunner(job)
