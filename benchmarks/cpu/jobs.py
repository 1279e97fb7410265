"""The work of a peer as data, which is sent to its process as JSON."""

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
"""Stages that the worker process times, in seconds."""

NUM_FIRST_TOKENS = 2
"""Tokens of `first_tokens_*`. The first one is forced, so that every peer needs a decoder call for the second only."""

DERIVED: dict[str, str] = {
    "step_greedy": "one more token, greedy: (answer - first tokens) / (tokens - 2)",
    "step_beams": "one more token, with beams",
}
"""Stages that are computed from others."""


@dataclass(frozen=True)
class Prompt:
    """A prompt."""

    task: str
    """Token of the task, such as `<OD>`."""
    text: str
    """The prompt's text, as the tokenizer gets it."""


@dataclass(frozen=True)
class Workload:
    """What every peer computes, and with how many threads."""

    image: str
    """Path of the image file."""
    resized_image: str
    """Path of the image in the model's size: for the tokens of a peer whose resizing differs."""
    first: Prompt
    second: Prompt
    """The second task, on the image that is already encoded."""
    num_tokens: int
    """Tokens of every answer, the end token included. Minimum and maximum are equal, for equal work."""
    num_beams: int
    """Beams of the search that is not greedy."""
    threads: int
    repeats: int
    """Timings of each stage in each process."""
    generation: dict[str, Any]
    """`no_repeat_ngram_size`, `length_penalty`, `early_stopping`, `forced_bos_token_id`, `forced_eos_token_id`."""

    def options(self, num_beams: int, num_tokens: int) -> dict[str, Any]:
        """Returns arguments of `generate`, in transformers' names, for exactly `num_tokens` tokens."""
        # The forced end token is the last of them; a minimum of `num_tokens` would forbid it there.
        lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens - 1}
        return {**self.generation, **lengths, "num_beams": num_beams}


@dataclass(frozen=True)
class Peer:
    """One way to run the model."""

    name: str
    title: str
    module: str
    """Name of a module in `benchmarks.cpu.peers`, or of a `.mjs` file there, which runs in Node."""
    model: str
    """The model that it loads: `checkpoint`, `transformers.js`, or `bundle:` and a precision."""
    precision: str
    """Precision of its arithmetic, for the floor: fp32, fp16, bf16, int8, int4, …"""
    options: dict[str, Any] = field(default_factory=dict)
    is_exact: bool = False
    """Whether its tokens must equal those of transformers in fp32."""


@dataclass(frozen=True)
class Job:
    """One run of one peer in a process of its own."""

    peer: Peer
    model: str
    """Path of the model that it loads."""
    checkpoint: str
    """Path of the checkpoint, for its config."""
    workload: Workload
    started: float
    """`time.time()` just before the process was started."""
    budget: float
    """Longest estimated answer in seconds; a peer whose arithmetic the CPU lacks may take longer, and is skipped."""

    def dump(self) -> str:
        """Returns the job as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls, text: str) -> Job:
        """Reads what `dump` returned."""
        raw = json.loads(text)
        workload = raw["workload"]
        prompts: dict[str, Any] = {name: Prompt(**workload.pop(name)) for name in ("first", "second")}
        raw |= {"peer": Peer(**raw["peer"]), "workload": Workload(**workload, **prompts)}
        return cls(**raw)
