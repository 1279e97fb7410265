"""What the option `scores` costs: `python -m benchmarks.cpu.scores_cost BUNDLE --tokens 64 --rounds 5`.

The same greedy answer of forced length with and without scores, by turns in one process; the ratio of the medians, of the
whole call and of its decode steps alone (the image is encoded before).
"""

import argparse
import time
from statistics import median

from benchmarks.machine import describe
from florence_onnx import Florence2, GenerationOptions, tasks
from florence_onnx.bundles.bundle import DEMO_DIRECTORY

SAMPLE = DEMO_DIRECTORY.parent / "samples" / "scene-1.png"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    model = Florence2.from_pretrained(
        given.bundle, device="cpu", session_options={"intra_op_num_threads": given.threads}
    )
    ways = {
        scored: GenerationOptions(
            num_beams=1,
            max_new_tokens=given.tokens,
            min_new_tokens=given.tokens,
            prompt_lookup_num_tokens=0,
            scores=scored,
        )
        for scored in (False, True)
    }
    whole: dict[bool, list[float]] = {way: [] for way in ways}
    steps: dict[bool, list[float]] = {way: [] for way in ways}
    encoded = model.encode(SAMPLE)
    for turn in range(given.rounds + 1):
        for way, options in ways.items():
            start = time.process_time()
            answer = model.run(tasks.OBJECT_DETECTION, SAMPLE, options=options)
            middle = time.process_time()
            model.run(tasks.OBJECT_DETECTION, encoded, options=options)
            end = time.process_time()
            assert len(answer.token_ids) > given.tokens
            if turn:  # the first one warms up
                whole[way].append(middle - start)
                steps[way].append(end - middle)
    print(describe())
    for name, taken in (("whole answer", whole), ("without the vision encoder", steps)):
        ratio = median(taken[True]) / median(taken[False])
        print(
            f"{name}: {median(taken[False]):.3f} s of processor time without scores, {ratio:.4f} times that with them"
        )


if __name__ == "__main__":
    main()
