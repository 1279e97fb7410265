"""What a peer is asked to do, as data that travels to its process and back as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

STAGES: dict[str, str] = {
    "preprocess": "image file to pixel values",
    "vision": "vision encoder",
    "text_encoder": "text encoder alone (ours and OpenVINO: with the cross-attention keys and values)",
    "first_tokens_greedy": "text encoder, prefill and the first two tokens, the forced one and the last, greedy",
    "first_tokens_beams": "the same with beams",
    "answer_greedy": "all tokens on an encoded image, greedy",
    "answer_beams": "all tokens on an encoded image, with beams",
    "second_task": "another task on the same image, greedy; the vision encoder again where features cannot be kept",
    "end_to_end_greedy": "image file to all tokens, greedy",
    "end_to_end_beams": "image file to all tokens, with beams",
}
"""What a child process times, in seconds."""

NUM_FIRST_TOKENS = 2
"""Of `first_tokens_*`: every peer needs a decoder call for the second only, since the first is forced."""

DERIVED: dict[str, str] = {
    "step_greedy": "one more token, greedy: (answer - first tokens) / (tokens - 2)",
    "step_beams": "one more token, with beams",
}
"""Stages that are computed from others."""


@dataclass(frozen=True)
class Prompt:
    """One question."""

    task: str
    """Token of the task, `<OD>`."""
    text: str
    """What the tokenizer gets."""


@dataclass(frozen=True)
class Workload:
    """What every peer computes, and with how much of the machine."""

    image: str
    """Path."""
    resized_image: str
    """The same in the model's size, for tokens of a peer that resizes in its own way."""
    first: Prompt
    second: Prompt
    """Asked on the encoded image."""
    num_tokens: int
    """Tokens that every answer has, the end token included: fewer are forbidden, more impossible."""
    num_beams: int
    threads: int
    repeats: int
    """Timings per stage and process."""
    generation: dict[str, Any]
    """`no_repeat_ngram_size`, `length_penalty`, `early_stopping`, `forced_bos_token_id`, `forced_eos_token_id`."""

    def options(self, num_beams: int, num_tokens: int) -> dict[str, Any]:
        """Arguments of `generate` (transformers' names) for exactly `num_tokens` tokens."""
        # the forced end token is the last of them, so that it must not be forbidden there
        lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens - 1}
        return {**self.generation, **lengths, "num_beams": num_beams}


@dataclass(frozen=True)
class Peer:
    """One way to run the model."""

    name: str
    title: str
    module: str
    """Below `benchmarks.cpu.peers`, or a `.mjs` file there for Node."""
    model: str
    """What it loads: `checkpoint`, `transformers.js`, or `bundle:` and a precision."""
    precision: str
    """Of its arithmetic, for the floor: fp32, fp16, bf16, int8, int4, …"""
    options: dict[str, Any] = field(default_factory=dict)
    is_exact: bool = False
    """Whether its tokens must equal those of transformers in fp32."""


@dataclass(frozen=True)
class Job:
    """One run of one peer in a process of its own."""

    peer: Peer
    model: str
    """Path of what it loads."""
    checkpoint: str
    """Path of the checkpoint, for its config."""
    workload: Workload
    started: float
    """`time.time()` just before the process was started."""
    budget: float
    """Seconds that an answer may take where the machine lacks the arithmetic for it."""

    def dump(self) -> str:
        """As JSON on one line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls, text: str) -> Job:
        """The inverse of `dump`."""
        raw = json.loads(text)
        workload = raw["workload"]
        prompts: dict[str, Any] = {name: Prompt(**workload.pop(name)) for name in ("first", "second")}
        raw |= {"peer": Peer(**raw["peer"]), "workload": Workload(**workload, **prompts)}
        return cls(**raw)
