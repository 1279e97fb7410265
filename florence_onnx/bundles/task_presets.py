"""Tasks of published fine-tunes, with the prompts that their model cards state.

The processors of these fine-tunes are Microsoft's, which know none of the tokens here: they reach the tokenizer as they are.
A card's `<CAPTION>` or `<MORE_DETAILED_CAPTION>` is a task of Florence-2, whose token becomes its sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

from florence_onnx import tasks
from florence_onnx.answers.postprocess import pure_text
from florence_onnx.tasks import Task


@dataclass(frozen=True)
class Preset:
    """The tasks of a family of fine-tunes."""

    models: tuple[str, ...]
    """Repositories on the hub."""
    tasks: tuple[Task[str], ...]
    """The tasks that Florence-2 does not have."""
    note: str = ""
    """What else the card says."""


def _literal(slug: str, token: str, description: str) -> Task[str]:
    return Task(slug, token, token, "nothing", pure_text, has_image=False, description=description)


_GENERATE_TAGS = _literal("generate-tags", "<GENERATE_TAGS>", "Tags of the image, in danbooru's style.")
_MIXED_CAPTION = _literal("mixed-caption", "<MIXED_CAPTION>", "A detailed caption, and tags.")
_ALSO = "caption, detailed-caption and more-detailed-caption are Florence-2's own tasks"

PRESETS: dict[str, Preset] = {
    "promptgen-v1": Preset(
        ("MiaoshouAI/Florence-2-base-PromptGen",),
        (_literal("generate-prompt", "<GENERATE_PROMPT>", "A prompt for image generation, as tags."),),
        _ALSO,
    ),
    "promptgen-v1.5": Preset(
        ("MiaoshouAI/Florence-2-base-PromptGen-v1.5", "MiaoshouAI/Florence-2-large-PromptGen-v1.5"),
        (_GENERATE_TAGS, _MIXED_CAPTION),
        _ALSO,
    ),
    "promptgen-v2.0": Preset(
        ("MiaoshouAI/Florence-2-base-PromptGen-v2.0", "MiaoshouAI/Florence-2-large-PromptGen-v2.0"),
        (
            _GENERATE_TAGS,
            _MIXED_CAPTION,
            _literal("analyze", "<ANALYZE>", "An analysis of the image's composition."),
            _literal(
                "mixed-caption-plus", "<MIXED_CAPTION_PLUS>", "A mixed caption, and the analysis of the composition."
            ),
        ),
        _ALSO,
    ),
    "docvqa": Preset(
        ("HuggingFaceM4/Florence-2-DocVQA",),
        (
            Task(
                "docvqa",
                "<DocVQA>",
                "<DocVQA>{input}",
                "text",
                pure_text,
                has_image=False,
                description="Answers a question about a document.",
            ),
        ),
        "no space between token and question, as in the published training code",
    ),
    "sd3-captioner": Preset(
        ("gokaygokay/Florence-2-SD3-Captioner",),
        (
            Task(
                "description",
                "<DESCRIPTION>",
                "<DESCRIPTION>{input}",
                "text",
                pure_text,
                has_image=False,
                description="Describes the image as the text asks, such as: Describe this image in great detail.",
            ),
        ),
        "the text is an instruction: Describe this image in great detail.",
    ),
    "cogflorence": Preset(
        ("thwri/CogFlorence-2.1-Large", "thwri/CogFlorence-2.2-Large"),
        (
            Task(
                "cog-caption",
                "<COG_CAPTION>",
                tasks.MORE_DETAILED_CAPTION.prompt,
                "nothing",
                pure_text,
                has_image=False,
                description="A paragraph about the image.",
            ),
        ),
        "the prompt of <MORE_DETAILED_CAPTION>, under a name of its own",
    ),
    "omniparser": Preset(
        ("microsoft/OmniParser-v2.0",),
        (
            Task(
                "icon-caption",
                "<ICON_CAPTION>",
                tasks.CAPTION.prompt,
                "nothing",
                pure_text,
                has_image=False,
                description="What the icon in a small crop of a screenshot does.",
            ),
        ),
        "the prompt of <CAPTION>, under a name of its own; OmniParser asks greedily for at most 20 tokens",
    ),
}
"""Presets by the name that `florence-onnx-export --task` takes."""
