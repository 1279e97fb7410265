"""Prompts as Microsoft's users write them: `<OD>`, `<REGION_TO_CATEGORY><loc_52><loc_332><loc_932><loc_774>`, `<DocVQA>What is …`.

The token of a known task becomes the sentence that the model was trained on. Any other text is the prompt itself, as in
the processors of Microsoft and transformers: a fine-tune's `<GENERATE_TAGS>` is read literally, as ordinary text.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from florence_onnx.answers.postprocess import PARSERS, pure_text
from florence_onnx.errors import InputError, TextInputError
from florence_onnx.tasks import TASKS, Task, check_unicode

_LEADING_TOKEN = re.compile(r"\s*(<[^<>\s]+>)")


def expand(text: str) -> str:
    """A task token, and what stands around it, to the prompt; any other text is the prompt itself.

    Args:
        text: What transformers' processor takes as `text`.

    Returns:
        The text that the tokenizer gets.

    Raises:
        InputError: Something stands beside the token of a task that takes no input.
    """
    task = find_task(text)
    if task is None:
        return text
    if task.needs == "nothing":
        if text != task.token:
            raise InputError(f"the task token {task.token} must be the whole prompt, got {text!r}")
        return task.prompt
    return task.prompt.replace("{input}", text.replace(task.token, "").strip())


def find_task(text: str) -> Task[Any] | None:
    """The Florence-2 task whose token occurs in a text; of several the one that the processors look for first."""
    for task in sorted(TASKS.values(), key=lambda task: task.needs != "nothing"):
        if task.token in text:
            return task
    return None


def to_task(prompt: str, parser: str | None = None) -> Task[Any]:
    """A task with a prompt that needs no further input.

    Args:
        prompt: A prompt as `expand` takes it.
        parser: One of `florence_onnx.answers.postprocess.PARSERS`. None: that of the task whose token the prompt has,
            and `pure_text` where it has none.

    Raises:
        InputError: The parser is unknown, or as for `expand`.
        TextInputError: The prompt is blank or not a string.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise TextInputError(f'a prompt is text such as "<GENERATE_TAGS>", got {prompt!r}')
    check_unicode("prompt", prompt)
    if "{input}" in prompt:
        raise TextInputError(f"a prompt is complete: put the text in the place of {{input}} in {prompt!r}")
    if parser is not None and parser not in PARSERS:
        raise InputError(f"unknown parser {parser!r}; the parsers are: {', '.join(PARSERS)}")
    task = _literal(prompt, find_task(prompt))
    if parser is None:
        return task
    chosen = PARSERS[parser]
    return replace(task, parser=chosen, has_image=chosen is not pure_text)


def _literal(prompt: str, known: Task[Any] | None) -> Task[Any]:
    if known is not None:
        return replace(known, prompt=expand(prompt), needs="nothing")
    token = _LEADING_TOKEN.match(prompt)
    return Task("prompt", token[1] if token else prompt, prompt, "nothing", pure_text, has_image=False)
