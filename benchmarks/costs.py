"""Operations and bytes of a model, computed from its config.

Divided by the machine's rates they give a lower bound on the times, the floor.

A multiplication and an addition count as two operations. Products and convolutions are counted; element-wise work
(softmax, GELU, normalisation) is not, so the floor is slightly below what is possible.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
"""Bits of a decoder weight; the scales of quantized blocks are not counted."""
CACHE_BITS = {"fp16": 16, "bf16": 16}
"""Bits of an element of the KV cache; 32 in every other precision."""
_CONV_KERNEL = 3
"""Kernel size of the depthwise convolutions."""


@dataclass(frozen=True)
class Product:
    """A matrix product `(rows, inner)` by `(inner, columns)`."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Costs:
    """Operations and bytes of one Florence-2 checkpoint."""

    vision: dict[str, Any]
    """`vision_config` of the native config.json."""
    text: dict[str, Any]
    """`text_config`."""
    image_size: tuple[int, int]
    """`(width, height)` in pixels."""

    @classmethod
    def read(cls, checkpoint: Path) -> Costs:
        """Reads the configs of a checkpoint in transformers' native layout."""
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        size = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))["size"]
        return cls(config["vision_config"], config["text_config"], (size["width"], size["height"]))

    # ------------------------------------------------------------------------------------------------------ vision

    @property
    def grids(self) -> list[tuple[int, int]]:
        """`(height, width)` of the token grid of every vision stage."""
        height, width = self.image_size[1], self.image_size[0]
        found = []
        for kernel, stride, padding in zip(
            *(self.vision[f"patch_{name}"] for name in ("size", "stride", "padding")), strict=True
        ):
            height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
            found.append((height, width))
        return found

    @property
    def num_image_tokens(self) -> int:
        """Tokens of the last stage's grid, plus one for their mean."""
        height, width = self.grids[-1]
        return height * width + 1

    def vision_products(self) -> Counter[Product]:
        """Counts the products of the vision encoder's linear layers by shape."""
        found: Counter[Product] = Counter()
        for (height, width), depth, columns in zip(
            self.grids, self.vision["depths"], self.vision["embed_dim"], strict=True
        ):
            tokens, padded = height * width, self._padded(height) * self._padded(width)
            hidden = round(columns * self.vision["mlp_ratio"])
            for attended in (padded, tokens):  # of windows, then of channels
                found[Product(attended, columns, 3 * columns)] += depth
                found[Product(attended, columns, columns)] += depth
            found[Product(tokens, columns, hidden)] += 2 * depth
            found[Product(tokens, hidden, columns)] += 2 * depth
        found[Product(self.num_image_tokens, self.vision["embed_dim"][-1], self.vision["projection_dim"])] += 1
        return found

    def _padded(self, side: int) -> int:
        window: int = self.vision["window_size"]
        return -(-side // window) * window

    def vision_flops(self) -> int:
        """Operations of the vision encoder for one image."""
        linear = sum(product.flops * count for product, count in self.vision_products().items())
        return linear + self._convolution_flops() + self._attention_flops()

    def _convolution_flops(self) -> int:
        channels, total = self.vision["in_channels"], 0
        stages = zip(
            self.grids, self.vision["depths"], self.vision["embed_dim"], self.vision["patch_size"], strict=True
        )
        for (height, width), depth, columns, kernel in stages:
            tokens = height * width
            total += 2 * tokens * kernel**2 * channels * columns
            total += depth * 4 * 2 * tokens * _CONV_KERNEL**2 * columns  # depthwise, two per block, two blocks
            channels = columns
        return total

    def _attention_flops(self) -> int:
        window, total = self.vision["window_size"], 0
        stages = zip(
            self.grids, self.vision["depths"], self.vision["embed_dim"], self.vision["num_groups"], strict=True
        )
        for (height, width), depth, columns, groups in stages:
            padded = self._padded(height) * self._padded(width)
            of_windows = 4 * padded * window**2 * columns
            of_channels = 4 * height * width * columns * (columns // groups)
            total += depth * (of_windows + of_channels)
        return total

    # -------------------------------------------------------------------------------------------------------- text

    def encoder_length(self, prompt_tokens: int) -> int:
        """Positions of the text encoder: image tokens and prompt tokens."""
        return self.num_image_tokens + prompt_tokens

    def text_encoder_flops(self, prompt_tokens: int) -> int:
        """Operations of the text encoder for one prompt, with the cross KV of every decoder layer."""
        length, width = self.encoder_length(prompt_tokens), self.text["d_model"]
        layer = 2 * length * (4 * width**2 + 2 * width * self.text["encoder_ffn_dim"]) + 4 * length**2 * width
        cross = 2 * length * 2 * width**2
        total: int = self.text["encoder_layers"] * layer + self.text["decoder_layers"] * cross
        return total

    def decoder_parameters(self) -> int:
        """Weights that a decode step reads: those of the layers and of the head, without cross KV projections."""
        width = self.text["d_model"]
        layer = 6 * width**2 + 2 * width * self.text["decoder_ffn_dim"]
        total: int = self.text["decoder_layers"] * layer + self.text["vocab_size"] * width
        return total

    def step_bytes(self, precision: str, *, prompt_tokens: int, past: int, num_beams: int) -> float | None:
        """Bytes that a decode step of one prompt reads from memory.

        Args:
            precision: A key of `WEIGHT_BITS`; any other gives None.
            prompt_tokens: Tokens of the prompt.
            past: Tokens in the self KV cache.
            num_beams: Beams; they share the weights and the cross KV.
        """
        if precision not in WEIGHT_BITS:
            return None
        weights = self.decoder_parameters() * WEIGHT_BITS[precision]
        row: int = 2 * self.text["decoder_layers"] * self.text["d_model"] * CACHE_BITS.get(precision, 32)
        return (weights + row * (self.encoder_length(prompt_tokens) + num_beams * past)) / 8

    def answer_flops(self, num_tokens: int, prompt_tokens: int = 12) -> int:
        """Operations from pixels to the last token, greedy, without the attention of the decoder."""
        decoder = 2 * num_tokens * self.decoder_parameters()
        return self.vision_flops() + self.text_encoder_flops(prompt_tokens) + decoder
