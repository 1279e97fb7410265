"""What constrained answers cost: `python -m benchmarks.cpu.constraints [--steps N]`.

The time of a search's part of a step, without the decoder, with a vocabulary as large as Florence-2's and logits that were drawn once.
Every variant is timed in turn, again and again, and the least time of each counts, which depends little on other processes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from florence_onnx import Florence2, GenerationOptions, Grammar
from florence_onnx.generation.automaton import Arc, Automaton
from florence_onnx.generation.generate import new_search
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.scores import AllScores, Floats

VOCABULARY = 51289
"""Florence-2's."""
LABELS = [f"label {number}" for number in range(80)]
ROUNDS = 7


def variants(model: Florence2) -> dict[str, SearchConfig]:
    """Configurations by name, for a model of Florence-2's vocabulary size."""
    found = {}
    for beams in (1, 3):
        for name, grammar in {
            "no constraint": None,
            "boxes of 80 labels": Grammar.boxes(LABELS),
            "boxes of any label": Grammar.boxes(),
            "text": Grammar.text(),
        }.items():
            options = GenerationOptions(beams, constrain=grammar, max_new_tokens=1000)
            config = model._resolve(options)
            if isinstance(config.constrain, Automaton):
                widen(config.constrain)
            found[f"{name}, {beams} beam{'s' if beams > 1 else ''}"] = config
    return found


def widen(automaton: Automaton) -> None:
    """Replaces the tokens of wide arcs of text by as many as Florence-2's vocabulary has, in place."""
    for node in automaton._nodes.values():
        node.arcs = tuple(_wide(arc) for arc in node.arcs)
        node.wide = tuple(_wide(arc) for arc in node.wide)


def _wide(arc: Arc) -> Arc:
    is_text = 100 < len(arc.ids) != 1000
    return Arc(np.arange(2000, VOCABULARY), arc.target) if is_text else arc


def seconds_a_step(config: SearchConfig, logits: Floats, steps: int) -> float:
    """Runs a search for at most some steps; returns the mean time of a step in seconds."""
    search = new_search(1, config, None)
    search.start()
    total, done, rows = 0.0, 0, 1
    for number in range(steps):
        scores = AllScores().read(np.roll(logits[:rows], 7 * number, axis=-1)[:, None].copy())
        begin = time.perf_counter()
        step = search.advance(scores)
        total, done = total + time.perf_counter() - begin, done + 1
        if step is None:
            break
        rows = len(step.rows)
    return total / done


def least(measure: Callable[[], float], found: dict[str, float], name: str) -> None:
    """Keeps the least of several measurements by name."""
    found[name] = min(found.get(name, np.inf), measure())


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    model = Florence2.from_pretrained("demo", device="cpu")
    logits = np.random.default_rng(0).standard_normal((3, VOCABULARY), dtype=np.float32)
    logits[:, 2] = -9  # answers go on
    found: dict[str, float] = {}
    chosen = variants(model)
    for _ in range(ROUNDS):
        for name, config in chosen.items():
            least(lambda config=config: seconds_a_step(config, logits, steps), found, name)  # type: ignore[misc]
    for name, seconds in found.items():
        print(f"| {name} | {1e3 * seconds:.3f} ms |")


if __name__ == "__main__":
    main()
