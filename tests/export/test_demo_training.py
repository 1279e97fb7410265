"""The parts of the demo model's training."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs the export extra")
pytest.importorskip("transformers", reason="training needs the export extra")
pytest.importorskip("matplotlib", reason="the drawn words use matplotlib's bundled fonts")

import torch
import transformers
from tokenizers import Tokenizer

from export.demo.architecture import FIRST_LOCATION_ID, GRID, IMAGE_TOKEN_ID, VOCABULARY, build_model
from export.demo.batches import KIND_OF_WORD, make_batch, make_targets, number_token_ids
from export.demo.finalize import save_checkpoint
from export.demo.losses import AuxiliaryHeads, auxiliary_loss, padded_indices, soft_location_loss
from export.demo.optimizers import MovingAverage, Muon, orthogonalise, split_parameters
from export.demo.scenes import make_scene
from export.demo.settings import TrainingSettings
from export.demo.tokenizer import save_tokenizer, train_tokenizer
from florence_onnx.answers.postprocess import BANNED_PHRASES

SETTINGS = replace(TrainingSettings(), vision_steps=1, joint_steps=9, images_per_step=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


def test_tokenizer_has_the_ids_that_the_architecture_names(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_to_id("<loc_0>") == FIRST_LOCATION_ID
    assert tokenizer.token_to_id("<loc_999>") == FIRST_LOCATION_ID + 999
    assert tokenizer.token_to_id("<image>") == IMAGE_TOKEN_ID
    assert tokenizer.get_vocab_size() == VOCABULARY


def test_drawn_words_are_one_token_a_letter(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("PIZZA", add_special_tokens=False).tokens == list("PIZZA")
    assert tokenizer.encode("Two diamonds").tokens == ["<s>", "Two", "Ġdiamonds", "</s>"]


def test_number_words_are_found(tokenizer: Tokenizer) -> None:
    words = {tokenizer.id_to_token(i) for i in number_token_ids(tokenizer)}
    assert {"Two", "Ġtwo", "Three", "Ġthree", "A", "Ġa", "Ġstars"} <= words


def test_rate_warms_up_holds_and_falls_to_zero() -> None:
    settings = TrainingSettings()
    assert settings.rate_scale(0) == pytest.approx(0.01)
    assert settings.rate_scale(settings.total_steps // 3) == 1
    assert settings.rate_scale(settings.total_steps) == 0


def test_location_targets_sharpen_and_auxiliary_heads_fade() -> None:
    settings = TrainingSettings()
    assert settings.sigma(0) == settings.sigma_start
    assert settings.sigma(settings.total_steps) == settings.sigma_end
    assert settings.auxiliary_weight(0) == 1
    assert settings.auxiliary_weight(settings.total_steps) == settings.auxiliary_end


def test_batch_depends_on_the_step_only(tokenizer: Tokenizer) -> None:
    first, again, other = (make_batch(SETTINGS, tokenizer, step) for step in (4, 4, 5))
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.groups[0].labels, again.groups[0].labels)
    assert not np.array_equal(first.images, other.images)


def test_vision_steps_have_twice_the_images_and_no_questions(tokenizer: Tokenizer) -> None:
    batch = make_batch(SETTINGS, tokenizer, 0)
    assert len(batch.images) == 6
    assert batch.groups == ()


def test_batches_are_padded_to_few_shapes(tokenizer: Tokenizer) -> None:
    for group in make_batch(SETTINGS, tokenizer, 3).groups:
        assert group.input_ids.shape[1] % 16 == 0
        assert group.labels.shape[1] % 8 == 0


def test_dense_targets_mark_every_thing() -> None:
    scenes = [make_scene(random.Random(seed), 128) for seed in range(20)]
    targets = make_targets(scenes)
    for i, scene in enumerate(scenes):
        assert targets.counts[i].sum() == len(scene.shapes)
        num_letters = len(scene.word.text) if scene.word else 0
        assert (targets.kind[i] == KIND_OF_WORD).any() == bool(num_letters)
        assert num_letters - 1 <= (targets.letter[i] > 0).sum() <= num_letters
        assert len(np.unique(targets.colour[i])) == 1 + len(scene.shapes)


def test_soft_location_loss_is_least_at_the_target() -> None:
    bins = torch.arange(1000.0)
    losses = [
        soft_location_loss(torch.log_softmax(-((bins - centre) ** 2) / 18, 0)[None], torch.tensor([500]), 3.0).item()
        for centre in (480.0, 495.0, 500.0, 505.0, 520.0)
    ]
    assert losses[2] == min(losses)
    assert losses[1] < losses[0]
    assert losses[3] < losses[4]


def test_padded_indices() -> None:
    indices, count = padded_indices(torch.tensor([False, True, True]), 4)
    assert indices.tolist() == [1, 2, 0, 0]
    assert count == 2


def test_auxiliary_loss_is_finite_without_any_word() -> None:
    scenes = [make_scene(random.Random(seed), 128, word_probability=0) for seed in range(2)]
    tokens = torch.randn(2, 1 + GRID * GRID, 128)
    loss, figures = auxiliary_loss(AuxiliaryHeads(), torch.randn(1000, 128), tokens, make_targets(scenes), 3.0)
    assert torch.isfinite(loss)
    assert 0 <= figures["kind_accuracy"] <= 1


def test_orthogonalise() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 24, 16)))
    assert values.min() > 0.7
    assert values.max() < 1.3


def test_muon_lowers_a_loss() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(32, 8)
    muon = Muon(layer.parameters())
    losses = []
    for _ in range(30):
        loss = (layer(x) - x).square().mean()
        losses.append(loss.item())
        layer.zero_grad()
        loss.backward()
        muon.step(0.02)
    assert losses[-1] < losses[0] / 2


def test_moving_average_follows_the_model() -> None:
    layer = torch.nn.Linear(2, 2)
    average = MovingAverage(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(3.0)
    for _ in range(80):
        average.update(layer)
    assert average.state["weight"] == pytest.approx(3.0, abs=0.01)


def test_checkpoint_loads_with_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build_model()
    assert sum(p.numel() for p in model.parameters()) < 3.3e6
    assert sum(map(len, split_parameters(model))) == len(list(model.parameters()))
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    save_checkpoint(model, tmp_path / "tokenizer", tmp_path / "checkpoint")
    loaded = transformers.Florence2ForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", dtype="auto")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "checkpoint")
    assert loaded.dtype == torch.float16
    assert (loaded.generation_config.num_beams, loaded.generation_config.no_repeat_ngram_size) == (3, 3)
    assert processor.num_image_tokens == GRID * GRID + 1
    config = json.loads((tmp_path / "checkpoint" / "processor_config.json").read_text(encoding="utf-8"))
    banned = config["post_processor_config"]["phrase_grounding"]["banned_grounding_tokens"]
    assert set(banned) == BANNED_PHRASES
