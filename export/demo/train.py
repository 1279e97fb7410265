"""Trains the demo model from scratch on a CPU: `python -m export.demo.train --out DIR`.

First the vision tower is trained alone with the auxiliary heads, then the whole model. In the second phase each image
is encoded once for several questions: the gradients of all answers are accumulated on a detached copy of the image
tokens, and one backward pass takes them through the tower. The run writes `tokenizer/`, `log.jsonl`, `state.pt` (read
by `--resume`) and, at its end, `checkpoint/` to DIR.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Florence2ForConditionalGeneration

from .architecture import FIRST_LOCATION_ID, IMAGE_MEAN, IMAGE_STD, IMAGE_TOKEN_ID, VOCABULARY, WIDTH, build_model
from .batches import Array, Batch, QuestionGroup, number_token_ids, stream_batches
from .evaluate import evaluate_model, summarise
from .finalize import make_processor, save_checkpoint
from .losses import LOCATIONS, AuxiliaryHeads, answer_loss, auxiliary_loss, kept_tokens
from .optimizers import MovingAverage, Muon, split_parameters
from .settings import TrainingSettings
from .tokenizer import EOS_ID, PAD_ID, save_tokenizer, train_tokenizer

CURVE_TASKS = (
    "<OD>",
    "<OCR>",
    "<OCR_WITH_REGION>",
    "<CAPTION>",
    "<REFERRING_EXPRESSION_SEGMENTATION>",
    "<REGION_TO_CATEGORY>",
)
LOG_EVERY = 25
SMOOTHING = 0.97


class Trainer:
    """The model, its optimizers and the log of one run."""

    def __init__(self, settings: TrainingSettings, out: Path) -> None:
        self.settings, self.out = settings, out
        self.tokenizer = _prepare_tokenizer(out / "tokenizer")
        self.model = build_model(settings.seed)
        self.heads = AuxiliaryHeads()
        matrices, self.others = split_parameters(self.model)
        self.muon = Muon(matrices)
        rest = [*self.others, *self.heads.parameters()]
        self.adam = torch.optim.AdamW(rest, lr=settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.average = MovingAverage(self.model, settings.ema_decay)
        self.text_weights = torch.full((self.model.lm_head.out_features,), settings.text_weight)
        self.text_weights[number_token_ids(self.tokenizer)] = settings.number_weight
        self.step = 0
        self.seconds = 0.0
        self.smoothed: dict[str, float] = {}

    def run(self) -> None:
        """Trains from the current step to the last one, and writes the checkpoint."""
        start = time.perf_counter() - self.seconds
        for batch in stream_batches(self.settings, self.tokenizer, self.step):
            self._update(batch)
            self.step += 1
            self.seconds = time.perf_counter() - start
            self._report()
        self.save_state()
        with torch.no_grad():
            self.model.load_state_dict({**self.model.state_dict(), **self.average.state})
        save_checkpoint(self.model, self.out / "tokenizer", self.out / "checkpoint")

    def save_state(self) -> None:
        """Writes the state from which a run is resumed."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "muon": self.muon.buffers,
            "adam": self.adam.state_dict(),
            "average": self.average.state,
            "average_updates": self.average.num_updates,
        }
        temporary = self.out / "state.tmp"
        torch.save(state, temporary)
        temporary.replace(self.out / "state.pt")

    def load_state(self, path: Path) -> None:
        """Loads a state file to continue from."""
        state: dict[str, Any] = torch.load(path)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.muon.buffers = state["muon"]
        self.adam.load_state_dict(state["adam"])
        self.average.state, self.average.num_updates = state["average"], state["average_updates"]

    def _update(self, batch: Batch) -> None:
        """Runs one optimizer step."""
        settings, step = self.settings, self.step
        sigma = settings.sigma(step)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = encode_images(self.model, batch.images)
            embeddings = self.model.lm_head.weight[LOCATIONS]
            loss, figures = auxiliary_loss(self.heads, embeddings, tokens, batch.targets, sigma)
        figures["auxiliary"] = loss.item()
        weighted = settings.auxiliary_weight(step) * loss
        if batch.groups:
            leaf = tokens.detach().float().requires_grad_()
            figures |= self._backward_answers(leaf, batch.groups, sigma)
            torch.autograd.backward([tokens, weighted], [leaf.grad.to(tokens.dtype), None])  # type: ignore[union-attr]
        else:
            weighted.backward()
        self._apply_gradients(settings.rate_scale(step))
        for name, value in figures.items():
            self.smoothed[name] = SMOOTHING * self.smoothed.get(name, value) + (1 - SMOOTHING) * value

    def _backward_answers(self, leaf: Tensor, groups: tuple[QuestionGroup, ...], sigma: float) -> dict[str, float]:
        """Adds the gradients of all answers to the language model and to the image tokens `leaf`."""
        num_tokens = sum(int((group.labels != PAD_ID).sum()) for group in groups)
        totals: dict[str, float] = {}
        for group in groups:
            with torch.autocast("cpu", torch.bfloat16):
                logits, labels = answer_logits(self.model, leaf, group)
            loss, sums = answer_loss(logits, labels, sigma, self.text_weights, self.settings.location_weight)
            (loss / num_tokens).backward()
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
        return {
            "location_loss": totals["location"] / max(1.0, totals["num_locations"]),
            "text_loss": totals["text"] / max(1.0, totals["num_text"]),
        }

    def _apply_gradients(self, rate_scale: float) -> None:
        with_gradient = [parameter for parameter in self.others if parameter.grad is not None]
        torch.nn.utils.clip_grad_norm_(with_gradient, self.settings.clip_norm)
        for group in self.adam.param_groups:
            group["lr"] = self.settings.adam_rate * rate_scale
        self.adam.step()
        self.muon.step(self.settings.muon_rate * rate_scale)
        self.model.zero_grad(set_to_none=True)
        self.heads.zero_grad(set_to_none=True)

    def _report(self) -> None:
        """Updates the average, logs, saves and evaluates, each at its own interval of steps."""
        settings, step = self.settings, self.step
        if step % settings.ema_every == 0:
            self.average.update(self.model)
        if step % LOG_EVERY == 0:
            self._log({name: round(value, 4) for name, value in self.smoothed.items()})
        if step % settings.state_every == 0:
            self.save_state()
        if step % settings.evaluate_every == 0 and step > settings.vision_steps:
            self._log({"evaluation": self._evaluate()})

    def _evaluate(self) -> dict[str, float]:
        """Evaluates the averaged weights on a few scenes, for the curves."""
        averaged = build_model(self.settings.seed)
        averaged.load_state_dict({**averaged.state_dict(), **self.average.state})
        averaged.train(False)
        report = evaluate_model(
            averaged,
            make_processor(self.out / "tokenizer"),
            seed=self.settings.evaluation_seed,
            num_scenes=self.settings.evaluation_scenes,
            tasks=CURVE_TASKS,
        )
        return summarise(report)

    def _log(self, figures: dict[str, Any]) -> None:
        record = {"step": self.step, "minutes": round(self.seconds / 60, 2), **figures}
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        print(record, flush=True)


def encode_images(model: Florence2ForConditionalGeneration, images: Array) -> Tensor:
    """Returns the projected image tokens (N, 65, width) of uint8 images (N, 128, 128, 3)."""
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (IMAGE_MEAN, IMAGE_STD))
    pixel_values = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    tokens: Tensor = model.model.multi_modal_projector(model.model.vision_tower(pixel_values))
    return tokens


def answer_logits(
    model: Florence2ForConditionalGeneration, image_tokens: Tensor, group: QuestionGroup
) -> tuple[Tensor, Tensor]:
    """Returns logits (K, vocabulary) and labels (K,) of the answer tokens that are not padding."""
    arrays = (group.image_index, group.input_ids, group.labels)
    index, input_ids, labels = (torch.from_numpy(array) for array in arrays)
    language_model = model.model.language_model
    inputs = torch.cat([image_tokens[index], language_model.shared(input_ids)], 1)
    visible = torch.ones(inputs.shape[:2], dtype=torch.long)
    visible[:, image_tokens.shape[1] :] = input_ids != PAD_ID
    states = language_model.encoder(inputs_embeds=inputs, attention_mask=visible).last_hidden_state
    hidden = language_model.decoder(
        input_ids=torch.cat([torch.full_like(labels[:, :1], EOS_ID), labels[:, :-1]], 1),
        encoder_hidden_states=states,
        encoder_attention_mask=visible,
        use_cache=False,
    ).last_hidden_state
    kept, count = kept_tokens(labels)
    logits = model.lm_head(hidden.reshape(-1, WIDTH)[kept])
    return logits[:count], labels.reshape(-1)[kept[:count]]


def _prepare_tokenizer(directory: Path) -> Tokenizer:
    if not (directory / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(), directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = (tokenizer.token_to_id("<loc_0>"), tokenizer.token_to_id("<image>"), tokenizer.get_vocab_size())
    expected = (FIRST_LOCATION_ID, IMAGE_TOKEN_ID, VOCABULARY)
    if ids != expected:
        raise ValueError(
            f"tokenizer in {directory} has <loc_0>, <image>, size = {ids}; architecture.py says {expected}"
        )
    return tokenizer


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory of all outputs")
    parser.add_argument("--resume", action="store_true", help="continue from DIR/state.pt")
    parser.add_argument("--vision-steps", type=int, default=TrainingSettings.vision_steps)
    parser.add_argument(
        "--joint-steps",
        type=int,
        default=TrainingSettings.joint_steps,
        help="may be changed with --resume: the learning rate then follows the schedule of the new length",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="2 are faster only on an idle machine; on a busy one they are 4 times slower",
    )
    return parser.parse_args()


def main() -> None:
    """Command line: trains and writes the checkpoint."""
    arguments = _parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = replace(TrainingSettings(), vision_steps=arguments.vision_steps, joint_steps=arguments.joint_steps)
    trainer = Trainer(settings, arguments.out)
    if arguments.resume:
        trainer.load_state(arguments.out / "state.pt")
    (arguments.out / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    trainer.run()


if __name__ == "__main__":
    main()
