"""The hyperparameters of the demo model's training."""

from dataclasses import dataclass, field


def _task_weights() -> dict[str, float]:
    return {
        "<CAPTION>": 2.6,
        "<DETAILED_CAPTION>": 1.5,
        "<MORE_DETAILED_CAPTION>": 1.5,
        "<OD>": 2.3,
        "<DENSE_REGION_CAPTION>": 1.3,
        "<REGION_PROPOSAL>": 1.2,
        "<CAPTION_TO_PHRASE_GROUNDING>": 1.6,
        "<REFERRING_EXPRESSION_SEGMENTATION>": 1.4,
        "<REGION_TO_SEGMENTATION>": 1.0,
        "<OPEN_VOCABULARY_DETECTION>": 1.6,
        "<REGION_TO_CATEGORY>": 0.7,
        "<REGION_TO_DESCRIPTION>": 0.9,
        "<REGION_TO_OCR>": 1.0,
        "<OCR>": 1.6,
        "<OCR_WITH_REGION>": 2.0,
    }


@dataclass(frozen=True)
class TrainingSettings:
    """Hyperparameters. Schedules depend on steps, not on time, so that a run is reproducible."""

    seed: int = 20261122  # step k draws its scenes from (seed, k); evaluation uses other seeds
    vision_steps: int = 350  # steps of the vision tower alone, on the auxiliary heads
    joint_steps: int = 4500  # steps of the whole model after them
    images_per_step: int = 16  # twice as many in a vision step
    questions_per_image: int = 6
    task_weights: dict[str, float] = field(default_factory=_task_weights)  # relative frequency of each task
    no_word_skip: float = 0.7  # share of OCR questions about a scene without a word that are replaced by others

    muon_rate: float = 0.015  # matrices and convolutions
    adam_rate: float = 1.5e-3  # embeddings, norms, biases, heads
    warmup_steps: int = 100
    hold: float = 0.5  # share of the run at the full rate; then linear to zero
    clip_norm: float = 1.0  # of the AdamW gradients

    sigma_start: float = 5.0  # standard deviation in bins of the soft location targets
    sigma_end: float = 2.0
    sigma_end_at: float = 0.7  # share of the run after which sigma_end is reached
    location_weight: float = 0.7  # per token
    text_weight: float = 1.3
    number_weight: float = 2.6  # tokens that depend on a count, see `batches.number_token_ids`
    auxiliary_start: float = 0.5  # weight of the auxiliary heads in a joint step, falling with the run
    auxiliary_end: float = 0.1

    ema_every: int = 5  # steps
    ema_decay: float = 0.99
    state_every: int = 200  # steps between saved states
    evaluate_every: int = 400
    evaluation_scenes: int = 32
    evaluation_seed: int = 777  # for the curves only; final figures come from a seed that was not used before

    @property
    def total_steps(self) -> int:
        """Number of vision and joint steps together."""
        return self.vision_steps + self.joint_steps

    def rate_scale(self, step: int) -> float:
        """Factor of both learning rates at a step: warm-up, hold, linear to zero."""
        done = step / self.total_steps
        decay = 1.0 if done < self.hold else (1 - done) / (1 - self.hold)
        return min(1.0, (step + 1) / self.warmup_steps) * max(0.0, decay)

    def sigma(self, step: int) -> float:
        """Standard deviation in bins of the soft location targets at a step."""
        done = min(1.0, step / self.total_steps / self.sigma_end_at)
        return self.sigma_start + (self.sigma_end - self.sigma_start) * done

    def auxiliary_weight(self, step: int) -> float:
        """Weight of the auxiliary heads at a step."""
        if step < self.vision_steps:
            return 1.0
        return max(self.auxiliary_end, self.auxiliary_start * (1 - step / self.total_steps))
