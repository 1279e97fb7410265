"""The model card of a pushed bundle: metadata that the hub reads, and what a user wants to know before a download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from florence_onnx.bundles.bundle import Bundle
from florence_onnx.generation.options import GenerationOptions

PIPELINE_TAG = "image-text-to-text"
"""The task by which the hub lists Florence-2."""
TAGS = ("onnx", "onnxruntime", "florence-2", "image-captioning", "object-detection", "image-segmentation", "ocr")


@dataclass(frozen=True)
class Published:
    """One bundle with what the card says of it."""

    bundle: Bundle
    num_bytes: int
    """Size of its files."""
    missing: str | None
    """What its verification lacks; None if it is verified."""


def make_card(
    repository: str,
    published: Sequence[Published],
    *,
    license: str,
    base_model: str | None,
    revision: str | None = None,
) -> str:
    """Writes the model card.

    Args:
        repository: `owner/name`.
        published: The bundles.
        license: The hub's identifier of the licence, such as `mit`.
        base_model: Hub id of the checkpoint; None where it is on no hub.
        revision: The branch that is pushed to; None is the default one.

    Returns:
        Markdown with YAML metadata at its top.
    """
    parts = [
        _metadata(published[0].bundle, license, base_model),
        f"# {repository.partition('/')[2]}\n",
        _introduction(published[0].bundle, base_model),
        *_warnings(published),
        _loading(repository, published, revision),
        _files(published),
        _agreement(published),
        f"## Licence\n\n`{license}`, the licence of the checkpoint.\n",
    ]
    return "\n".join(parts)


def _metadata(bundle: Bundle, license: str, base_model: str | None) -> str:
    from huggingface_hub import ModelCardData

    is_own = bundle.layout == "florence_onnx"
    facts = ModelCardData(
        library_name="florence_onnx" if is_own else "transformers.js",
        pipeline_tag=PIPELINE_TAG,
        base_model=base_model,
        license=license,
        tags=list(TAGS),
    )
    return f"---\n{facts.to_yaml()}\n---\n"


def _introduction(bundle: Bundle, base_model: str | None) -> str:
    source = bundle.source
    name = base_model or source.get("name", "a checkpoint")
    commit = f" (revision `{source['revision']}`)" if source.get("revision") else ""
    adapter = f", with the adapter `{source['adapter']}` merged," if source.get("adapter") else ""
    exporter = bundle.verification.get("versions", {}).get("florence_onnx", "")
    tool = f"florence_onnx {exporter}".strip()
    return f"`{name}`{commit}{adapter} as ONNX graphs, exported by {tool}. It runs on ONNX Runtime, without PyTorch.\n"


def _warnings(published: Sequence[Published]) -> Iterator[str]:
    for each in published:
        if each.missing is not None:
            yield f"> **Not verified** ({each.bundle.precision}): {each.missing}. Answers may differ from the checkpoint's.\n"


def _loading(repository: str, published: Sequence[Published], revision: str | None) -> str:
    precision = f', precision="{published[-1].bundle.precision}"' if len(published) > 1 else ""
    at = f', revision="{revision}"' if revision else ""
    option = f" --revision {revision}" if revision else ""
    return f"""## How to load it

```bash
pip install 'florence-onnx[cpu,cli]'
florence-onnx pull {repository} DIR{option}  # optional: downloads it and checks every hash
```

```python
from florence_onnx import Florence2, tasks

model = Florence2.from_pretrained("{repository}"{precision}{at})
print(model.run(tasks.DETAILED_CAPTION, "image.jpg").results)
```
"""


def _files(published: Sequence[Published]) -> str:
    rows = [
        (
            each.bundle.precision,
            each.bundle.vision_precision or each.bundle.precision,
            ", ".join(f"{width} × {height}" for width, height in each.bundle.image_sizes),
            f"{each.num_bytes / 1e6:,.1f} MB",
            _changed(each.bundle) or "the checkpoint's",
        )
        for each in published
    ]
    headings = ("precision", "vision encoder", "image sizes in pixels", "size", "generation defaults")
    return f"## Sizes\n\n{_table(headings, rows)}"


def _changed(bundle: Bundle) -> str:
    """The generation defaults that the bundle's owner has set."""
    own = bundle.checkpoint_generation
    if own is None:
        return ""
    names = [name for name in GenerationOptions.__dataclass_fields__ if _differs(bundle, name)]
    return ", ".join(f"`{name}={getattr(bundle.generation.options, name)}`" for name in names)


def _differs(bundle: Bundle, name: str) -> bool:
    own = bundle.checkpoint_generation
    return own is not None and getattr(bundle.generation.options, name) != getattr(own.options, name)


def _agreement(published: Sequence[Published]) -> str:
    rows = [row for each in published for row in _figures(each.bundle)]
    if not rows:
        return "## Agreement with the checkpoint\n\nNothing was measured.\n"
    versions = published[0].bundle.verification.get("versions", {})
    reference = f"transformers {versions.get('transformers', '')}".strip()
    headings = ("precision", "what", "max abs error", "max relative error", "tokens equal")
    return f"""## Agreement with the checkpoint

Measured by the export against {reference} in fp32 on a CPU: every graph's outputs, then whole answers token by token.

{_table(headings, rows)}"""


def _figures(bundle: Bundle) -> Iterator[tuple[str, ...]]:
    verification: Mapping[str, Any] = bundle.verification
    for name, error in verification.get("graphs", {}).items():
        yield bundle.precision, f"`{name}`", f"{error['max_abs']:.2e}", f"{error['max_rel']:.2e}", ""
    for name, tokens in verification.get("tokens", {}).items():
        yield bundle.precision, f"answers, {name}", "", "", f"{tokens['equal']} of {tokens['total']}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
