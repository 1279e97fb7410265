"""The text graphs of the transformers.js layout (`onnx-community/Florence-2-*`), on the host only.

The layout has a token embedding, an encoder, and a merged decoder whose self KV cache grows by one token a step and
which returns the cross KV at its first step only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from florence_onnx.generation.generate import DecoderSession
from florence_onnx.inference.decoder import DecoderShape, Floats, full_attention_mask, present_name
from florence_onnx.inference.decoder_inputs import Ids
from florence_onnx.runtime.engine import Engine

Array = npt.NDArray[Any]


class TransformersJsTextModel:
    """`embed_tokens`, `encoder_model` and `decoder_model_merged` as a `decoder.TextBackend`."""

    def __init__(self, embed_tokens: Engine, encoder: Engine, decoder: Engine, shape: DecoderShape) -> None:
        self._embed_tokens = embed_tokens
        self._encoder = encoder
        self._decoder = decoder
        self._shape = shape

    def start(self, input_ids: Ids, attention_mask: Ids, image_features: Floats) -> DecoderSession:
        text = self._embed_tokens.run({"input_ids": input_ids})["inputs_embeds"]
        embeds = np.concatenate([image_features.astype(text.dtype, copy=False), text], axis=1)
        mask = full_attention_mask(attention_mask, image_features.shape[1])
        hidden = self._encoder.run({"attention_mask": mask, "inputs_embeds": embeds})["last_hidden_state"]
        return GrowingDecoder(self._embed_tokens, self._decoder, self._shape, mask, hidden)


class GrowingDecoder:
    """A decoder session over `decoder_model_merged`; to reorder its rows copies the whole cache."""

    def __init__(self, embed_tokens: Engine, decoder: Engine, shape: DecoderShape, mask: Ids, hidden: Array) -> None:
        """Args:
        embed_tokens: The token embedding graph.
        decoder: The merged decoder graph.
        shape: Sizes of the decoder.
        mask: Encoder attention mask `(P, E)`.
        hidden: Encoder output `(P, E, D)`.
        """
        self._embed_tokens = embed_tokens
        self._decoder = decoder
        self._state = {"encoder_attention_mask": mask, "encoder_hidden_states": hidden}
        self._past = self._empty_past(shape, len(mask))
        self._has_past = False

    def _empty_past(self, shape: DecoderShape, num_rows: int) -> dict[str, Array]:
        names = [name for name in self._decoder.inputs if name.startswith("past_key_values.")]
        size = (num_rows, shape.num_heads, 0, shape.head_dim)
        return {name: np.zeros(size, dtype=self._decoder.inputs[name]) for name in names}

    def step(self, token_ids: Ids) -> Floats:
        # One token at a time, as transformers.js does: graphs on the hub may not apply a causal mask to several new tokens,
        # and would then give wrong answers without an error.
        for column in range(token_ids.shape[1]):
            logits = self._step_one(token_ids[:, column : column + 1])
        return logits

    def _step_one(self, token_ids: Ids) -> Floats:
        embeds = self._embed_tokens.run({"input_ids": token_ids})["inputs_embeds"]
        feeds: dict[str, Array] = {"inputs_embeds": embeds, **self._state, **self._past}
        feeds["use_cache_branch"] = np.array([self._has_past])
        outputs = self._decoder.run({name: feeds[name] for name in self._decoder.inputs})
        for name in self._past:
            if not self._has_past or ".decoder." in name:
                self._past[name] = outputs[present_name(name)]
        self._has_past = True
        return outputs["logits"][:, -1].astype(np.float32)

    def reorder(self, rows: Ids, prompts: Ids) -> None:
        for arrays in (self._state, self._past):
            arrays.update({name: array[rows] for name, array in arrays.items()})
