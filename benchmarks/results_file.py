"""Files of results, such as `benchmarks/results/answers.md`, of which each measurement writes one part."""

from pathlib import Path

PATH = Path(__file__).resolve().parent / "results" / "answers.md"
TITLE = "# Answers one can act on"


def write_part(title: str, text: str, path: Path = PATH) -> None:
    """Writes a part under its title, in place of the one that was there; the others stay as they are.

    Args:
        title: Of the part, without `##`.
        text: Markdown without headings of the first or second level.
        path: The file; made if it is missing.
    """
    old = path.read_text(encoding="utf-8") if path.exists() else TITLE + "\n"
    head, *parts = old.split("\n## ")
    known = {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in parts}
    known[title] = text.strip()
    written = [head.strip(), *(f"## {name}\n\n{body}" for name, body in known.items())]
    path.write_text("\n\n".join(written) + "\n", encoding="utf-8")
