"""Run by the Python of an environment with transformers 5: saves a checkpoint once more as that version does, and answers with it.

    python tests/export/transformers5.py CHECKPOINT OUT QUESTIONS.npz

OUT gets the folder that transformers 5 writes, and `answers.json`: the token ids of its `generate` for every question and search.
Imports nothing of this project, which needs another transformers.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

SEARCHES = {
    "own": {},
    "greedy": {"num_beams": 1},
    "two beams": {"num_beams": 2, "early_stopping": False, "length_penalty": 0.5},
}


def main() -> None:
    source, output, questions = sys.argv[1:]
    torch.set_num_threads(1)
    model = transformers.Florence2ForConditionalGeneration.from_pretrained(source).eval()
    model.save_pretrained(output)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(output)
    transformers.AutoImageProcessor.from_pretrained(source).save_pretrained(output)
    given = np.load(questions)
    pixel_values = torch.from_numpy(given["pixel_values"])
    answers = {}
    for name, options in SEARCHES.items():
        answers[name] = []
        for key in sorted(key for key in given if key.startswith("input_ids")):
            with torch.inference_mode():
                tokens = model.generate(
                    input_ids=torch.from_numpy(given[key])[None],
                    attention_mask=torch.ones(1, len(given[key]), dtype=torch.long),
                    pixel_values=pixel_values,
                    max_new_tokens=24,
                    **options,
                )
            answers[name].append(tokens[0].tolist())
    content = {"transformers": transformers.__version__, "torch": torch.__version__, "answers": answers}
    (Path(output) / "answers.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
