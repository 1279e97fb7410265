"""transformers on the GPU, eager and compiled, with the same images, prompts, searches and numbers of tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.gpu.figures import Figures
from benchmarks.gpu.hardware import Memory
from benchmarks.gpu.ours import Workload, _difference
from benchmarks.gpu.timing import Effort, device_time, timed
from export.verification.photograph import PHOTOGRAPH
from florence_onnx import tasks
from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles.tokenizer import PromptTokenizer
from florence_onnx.images import preprocessing

VARIANTS: dict[str, dict[str, Any]] = {
    "fp16": {"dtype": "float16"},
    "bf16": {"dtype": "bfloat16"},
    "compile": {"dtype": "float16", "is_compiled": True},
    "fp32": {"dtype": "float32"},
}
SEARCH = ("no_repeat_ngram_size", "length_penalty", "early_stopping", "forced_bos_token_id", "forced_eos_token_id")
"""The generation settings of the checkpoint that are passed to `generate`."""


class Transformers:
    """`Florence2ForConditionalGeneration` on a device."""

    def __init__(
        self, checkpoint: Path, bundle: bundles.Bundle, device: str, *, dtype: str, is_compiled: bool = False
    ) -> None:
        """Loads a checkpoint, or initialises the model of its config at random if it has no weights.

        Args:
            checkpoint: Folder with a `config.json` in transformers' native layout.
            bundle: A bundle of the same model, for sizes, tokenizer and generation settings.
            device: `cpu` or `cuda`.
            dtype: Dtype of weights and arithmetic, as torch names it.
            is_compiled: Whether to use a static cache and `torch.compile`.
        """
        import torch
        from transformers import Florence2Config, Florence2ForConditionalGeneration

        self.torch: Any = torch
        self.device = device
        self._dtype = getattr(torch, dtype)
        self.sizes = bundle.sizes
        self._tokenizer = PromptTokenizer(bundle.tokenizer, pad_token_id=self.sizes.pad_token_id)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        if (checkpoint / "model.safetensors").is_file():
            model = Florence2ForConditionalGeneration.from_pretrained(checkpoint, dtype=self._dtype).to(device)
        else:
            torch.manual_seed(0)
            torch.set_default_dtype(self._dtype)  # an fp32 model, converted later, would need twice the memory
            with torch.device(device):
                model = Florence2ForConditionalGeneration(Florence2Config.from_dict(config))
            torch.set_default_dtype(torch.float32)
        self.model: Any = model.eval()
        stated = json.loads((bundle.path / bundles.GENERATION_CONFIG).read_text(encoding="utf-8"))
        self._search = {name: stated[name] for name in SEARCH if stated.get(name) is not None}
        self._ids = {
            name: stated[name] for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
        }
        self.is_compiled = is_compiled
        self._static = {"cache_implementation": "static"} if is_compiled else {}
        if is_compiled:
            self._compile()

    def _compile(self) -> None:
        """Compiles the encoders. With a static cache on a GPU, `generate` compiles the decode step itself."""
        self.torch._dynamo.config.recompile_limit = 64
        backend = {"backend": "eager"} if self.device == "cpu" else {}  # needs no compiler: a smoke test
        for part in (self.model.model.vision_tower, self.model.model.language_model.encoder):
            part.compile(dynamic=False, **backend)

    def pixel_values(self, images: Sequence[Image.Image]) -> Any:
        """Returns `pixel_values` `(B, 3, H, W)` on the device, preprocessed as in our runtime."""
        sizes = self.sizes
        arrays = [
            preprocessing.preprocess(each, size=sizes.image_size, mean=sizes.image_mean, std=sizes.image_std)
            for each in images
        ]
        return self.torch.from_numpy(np.concatenate(arrays)).to(self.device, self._dtype)

    def synchronize(self) -> None:
        if self.device != "cpu":
            self.torch.cuda.synchronize()

    def vision(self, pixel_values: Any) -> None:
        with self.torch.inference_mode():
            self.model.get_image_features(pixel_values)
        self.synchronize()

    def inputs(self, pixel_values: Any, prompts: Sequence[str]) -> dict[str, Any]:
        """Returns the inputs of `generate`."""
        ids, mask = self._tokenizer.encode(prompts)
        tokens = self.sizes.num_image_tokens
        marks = np.full((len(ids), tokens), self.model.config.image_token_id, dtype=np.int64)
        both = np.concatenate([marks, ids], axis=1)
        whole = np.concatenate([np.ones_like(marks), mask], axis=1)
        return {
            "input_ids": self.torch.from_numpy(both).to(self.device),
            "attention_mask": self.torch.from_numpy(whole).to(self.device),
            "pixel_values": pixel_values,
        }

    def generate(self, inputs: dict[str, Any], num_beams: int, **lengths: int) -> list[list[int]]:
        """Returns the token ids of each row from the decoder start token on, padded to the longest row."""
        with self.torch.inference_mode():
            tokens = self.model.generate(
                **inputs, **self._search, **self._ids, **self._static, num_beams=num_beams, do_sample=False, **lengths
            )
        rows: list[list[int]] = tokens.tolist()
        return rows

    def answers(self, images: Sequence[Image.Image], num_beams: int, num_tokens: int) -> int:
        """Generates exactly `num_tokens` tokens for each image; returns the number of tokens."""
        inputs = self.inputs(self.pixel_values(images), [tasks.CAPTION.format_prompt()] * len(images))
        found = self.generate(inputs, num_beams, max_new_tokens=num_tokens, min_new_tokens=num_tokens - 1)
        return len(found[0]) - 1

    def score(self, inputs: dict[str, Any], token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Returns the logits `(L - 1, V)` at every position of a given answer, in one pass."""
        ids = self.torch.tensor([list(token_ids[:-1])], device=self.device)
        with self.torch.inference_mode():
            logits = self.model(**inputs, decoder_input_ids=ids, use_cache=False).logits
        found: npt.NDArray[np.float32] = logits[0].float().cpu().numpy()
        return found


def measure(
    checkpoint: Path, bundle: Path, variant: str, device: str, workload: Workload, effort: Effort, figures: Figures
) -> None:
    """Times one variant, see `ours.measure`. The throughput is that of the largest batch."""
    with Memory() as memory:
        begin = time.perf_counter()
        peer = Transformers(checkpoint, bundles.read(bundle), device, **VARIANTS[variant])
        figures.add("load_s", time.perf_counter() - begin)
        with Image.open(PHOTOGRAPH) as opened:
            image = opened.convert("RGB").resize(peer.sizes.image_size)
        for batch in workload.batches:
            _measure_batch(peer, [image] * batch, workload, effort, figures)
            if batch == 1:
                figures.add("memory_b1", memory.peak())
        figures.add("memory_all", memory.peak())
    if device != "cpu":
        _measure_device(peer, image, workload, figures)


def _measure_batch(
    peer: Transformers, images: list[Image.Image], workload: Workload, effort: Effort, figures: Figures
) -> None:
    batch = len(images)
    pixel_values = peer.pixel_values(images)
    figures.attempt(f"vision_b{batch}", lambda: timed(lambda: peer.vision(pixel_values), effort))
    for search, beams, counts in _searches(peer, batch, workload):
        names = [_name(search, count, batch, workload) for count in counts]
        for name, count in zip(names, counts, strict=True):
            figures.attempt(name, partial(timed, partial(peer.answers, images, beams, count), effort))
        if len(counts) > 1:
            steps = counts[-1] - counts[0]
            figures.attempt(f"step_{search}_b{batch}", partial(_difference, figures, names[-1], names[0], steps))
    caption = figures.found.get(f"caption_b{batch}")
    if caption and batch == workload.batches[-1]:
        figures.add("throughput_captions", {"per_s": batch / caption["min_ms"] * 1e3})


def _searches(peer: Transformers, batch: int, workload: Workload) -> list[tuple[str, int, list[int]]]:
    """Returns name, beams and numbers of tokens of each search; fewer if compiled, as every length is compiled anew."""
    caption, long = workload.caption_tokens, workload.long_tokens
    greedy = [caption, long] if batch == 1 else [caption] if peer.is_compiled else [2, caption]
    return [("greedy", 1, greedy), ("beams", workload.num_beams, [caption] if peer.is_compiled else [2, caption])]


def _name(search: str, count: int, batch: int, workload: Workload) -> str:
    if count == workload.long_tokens:
        return f"greedy128_b{batch}"
    if count == workload.caption_tokens:
        return f"caption{'_greedy' if search == 'greedy' else ''}_b{batch}"
    return f"whole_{search}_{count}_b{batch}"


def _measure_device(peer: Transformers, image: Image.Image, workload: Workload, figures: Figures) -> None:
    pixel_values = peer.pixel_values([image])
    figures.attempt("encode_b1_device", partial(device_time, lambda: peer.vision(pixel_values)))
    call = partial(peer.answers, [image], workload.num_beams, workload.caption_tokens)
    figures.attempt("caption_b1_device", partial(device_time, call))
