"""Losses: soft targets for location tokens, weighted text, and auxiliary heads that are not exported."""

from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from .architecture import FIRST_LOCATION_ID, WIDTH
from .batches import KIND_OF_WORD, Targets
from .questions import NUM_BINS, NUMBERS
from .scenes import BACKGROUNDS, COLOURS, DIAMETERS, LETTERS, SHAPE_KINDS
from .tokenizer import PAD_ID

NUM_KINDS = KIND_OF_WORD + 1
MAX_LETTERS = 6
KEPT_MULTIPLE, BOX_MULTIPLE = 256, 128  # lengths of gathered rows are padded: see batches.PROMPT_MULTIPLE
LOCATIONS = slice(FIRST_LOCATION_ID, FIRST_LOCATION_ID + NUM_BINS)


class AuxiliaryHeads(nn.Module):
    """Linear heads on the image tokens: the kind of object, its attributes, their number, and letters."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Linear(WIDTH, NUM_KINDS)
        self.colour = nn.Linear(WIDTH, len(COLOURS))
        self.size = nn.Linear(WIDTH, len(DIAMETERS))
        self.peers = nn.Linear(WIDTH, len(NUMBERS) - 1)
        self.box = nn.Linear(WIDTH, 4 * WIDTH)  # four queries, multiplied with the tied location embeddings
        self.letter = nn.Linear(WIDTH, 2 * (1 + len(LETTERS)))
        self.letter_index = nn.Linear(WIDTH, 2 * MAX_LETTERS)
        self.background = nn.Linear(WIDTH, len(BACKGROUNDS))
        self.ink = nn.Linear(WIDTH, 2)
        self.counts = nn.Linear(WIDTH, len(SHAPE_KINDS) * len(NUMBERS))  # of the pooled token


def padded_indices(mask: Tensor, multiple: int) -> tuple[Tensor, int]:
    """Returns the indices of the true entries of (N,), padded with 0 to a multiple, and their number."""
    indices = mask.nonzero().squeeze(1)
    count = len(indices)
    return functional.pad(indices, (0, -count % multiple)), count


def soft_location_loss(log_probabilities: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Computes the cross-entropy against a Gaussian over neighbouring bins.

    Args:
        log_probabilities: (N, 1000).
        target: (N,) bins.
        sigma: Standard deviation of the Gaussian in bins.

    Returns:
        (N,) losses.
    """
    radius = max(3, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    neighbours = target[:, None] + offsets
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)[None] * ((neighbours >= 0) & (neighbours < NUM_BINS))
    weights = weights / weights.sum(1, keepdim=True)
    return -(weights * log_probabilities.gather(1, neighbours.clamp(0, NUM_BINS - 1))).sum(1)


def answer_loss(
    logits: Tensor, labels: Tensor, sigma: float, text_weights: Tensor, location_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Computes the summed loss of some answer tokens.

    Args:
        logits: (N, vocabulary).
        labels: (N,) token ids.
        sigma: Standard deviation of the location targets in bins.
        text_weights: (vocabulary,) weight of every text token.
        location_weight: Weight of a location token.

    Returns:
        The loss, and the unweighted sums and counts `location`, `num_locations`, `text`, `num_text`.
    """
    log_probabilities = torch.log_softmax(logits.float(), -1)
    is_location = (labels >= LOCATIONS.start) & (labels < LOCATIONS.stop)
    text = labels[~is_location]
    text_losses = -log_probabilities[~is_location].gather(1, text[:, None]).squeeze(1)
    bins = labels[is_location] - LOCATIONS.start
    location_loss = soft_location_loss(log_probabilities[is_location][:, LOCATIONS], bins, sigma).sum()
    sums = {
        "location": location_loss.item(),
        "num_locations": float(len(bins)),
        "text": text_losses.sum().item(),
        "num_text": float(len(text)),
    }
    return location_weight * location_loss + (text_weights[text] * text_losses).sum(), sums


def auxiliary_loss(
    heads: AuxiliaryHeads, location_embeddings: Tensor, tokens: Tensor, targets: Targets, sigma: float
) -> tuple[Tensor, dict[str, float]]:
    """Computes the loss of all auxiliary heads.

    Args:
        heads: The heads.
        location_embeddings: (1000, width), tied with the language model.
        tokens: Projected image tokens (N, 1 + G * G, width), the pooled one first.
        targets: Dense targets of the N images.
        sigma: Standard deviation of the box targets in bins.

    Returns:
        The weighted sum, and figures for the log.
    """
    t = {f.name: torch.from_numpy(getattr(targets, f.name)) for f in fields(targets)}
    cells = tokens[:, 1:].reshape(-1, WIDTH)
    kind, colour = t["kind"].reshape(-1), t["colour"].reshape(-1)
    kind_logits = heads.kind(cells).float()
    kind_weights = torch.tensor([0.3] + [1.0] * (NUM_KINDS - 1))
    box, box_error = _box_loss(heads, location_embeddings, cells, kind > 0, t["box"], sigma)
    letter, letter_accuracy = _letter_loss(heads, cells, kind, t["letter"].reshape(-1))
    counts, count_accuracy = _count_loss(heads, tokens[:, 0], t["counts"])
    total = (
        functional.cross_entropy(kind_logits, kind, weight=kind_weights)
        + _masked(heads.colour(cells), colour)
        + 0.5 * _masked(heads.size(cells), t["size"].reshape(-1))
        + 0.5 * _masked(heads.peers(cells), t["peers"].reshape(-1))
        + 0.7 * box
        + 1.5 * letter
        + 0.5 * _masked(heads.letter_index(cells).reshape(-1, MAX_LETTERS), t["letter_index"].reshape(-1))
        + _masked(heads.background(cells), t["background"].reshape(-1))
        + _masked(heads.ink(cells), t["ink"].reshape(-1))
        + counts
    )
    things = kind > 0
    figures = {
        "kind_accuracy": _accuracy(kind_logits[things], kind[things]),
        "box_error": box_error,
        "letter_accuracy": letter_accuracy,
        "count_accuracy": count_accuracy,
    }
    return total, figures


def kept_tokens(labels: Tensor) -> tuple[Tensor, int]:
    """Returns the indices of the labels (M * L, flattened) that are not padding, see `padded_indices`."""
    return padded_indices((labels != PAD_ID).reshape(-1), KEPT_MULTIPLE)


def _masked(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the rows that have a target; 0 if none has."""
    loss = functional.cross_entropy(logits.float(), target, ignore_index=-1, reduction="sum")
    return loss / (target >= 0).sum().clamp(min=1)


def _accuracy(logits: Tensor, target: Tensor) -> float:
    return (logits.argmax(-1) == target).float().mean().item()


def _box_loss(
    heads: AuxiliaryHeads, location_embeddings: Tensor, cells: Tensor, owned: Tensor, box: Tensor, sigma: float
) -> tuple[Tensor, float]:
    indices, count = padded_indices(owned, BOX_MULTIPLE)
    queries = heads.box(cells[indices]).reshape(-1, WIDTH)
    logits = (queries @ location_embeddings.T.to(queries.dtype)).float()
    log_probabilities = torch.log_softmax(logits, -1)[: 4 * count]
    target = box.reshape(-1, 4)[owned].reshape(-1)
    error = (log_probabilities.argmax(-1) - target).abs().float().mean().item()
    return soft_location_loss(log_probabilities, target, sigma).mean(), error


def _letter_loss(heads: AuxiliaryHeads, cells: Tensor, kind: Tensor, letter: Tensor) -> tuple[Tensor, float]:
    """Weights letters on and near the word more than tokens far from it, where the target is always "none"."""
    logits = heads.letter(cells).float().reshape(-1, 1 + len(LETTERS))
    near = (kind == KIND_OF_WORD).repeat_interleave(2) | (letter > 0)
    loss = _masked(logits[near], letter[near]) + 0.3 * _masked(logits[~near], letter[~near])
    return loss, _accuracy(logits[letter > 0], letter[letter > 0])


def _count_loss(heads: AuxiliaryHeads, pooled: Tensor, counts: Tensor) -> tuple[Tensor, float]:
    logits = heads.counts(pooled).float().reshape(-1, len(NUMBERS))
    target = counts.reshape(-1)
    present = target > 0
    return functional.cross_entropy(logits, target), _accuracy(logits[present], target[present])
