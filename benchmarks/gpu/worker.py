"""The process of one step: `python -m benchmarks.gpu.worker JSON`, started by `__main__`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.gpu.figures import Figures
from benchmarks.gpu.sources import MissingError
from benchmarks.gpu.steps import RUNNERS, Settings, Step

SKIPPED = 3
"""Exit code of a step that lacks something; the last line of its output says what."""


def main() -> None:
    """Runs the step in the JSON of the command line, which has `step`, `settings` and the path `figures`."""
    given = json.loads(sys.argv[1])
    step, settings = Step(**given["step"]), Settings(**given["settings"])
    try:
        RUNNERS[step.kind](step, settings, Figures(Path(given["figures"])))
    except MissingError as reason:
        print(reason, file=sys.stderr, flush=True)
        sys.exit(SKIPPED)


if __name__ == "__main__":
    main()
