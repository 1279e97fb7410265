"""Generation options: those of a call, the defaults of a checkpoint, and the checked configuration made of both.

Names and meanings are those of transformers 4.57's `generate`; `seed` is ours. `option_names` says which of transformers'
names are refused and which are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from florence_onnx.errors import OptionsError
from florence_onnx.generation import option_values as values

EarlyStopping = bool | Literal["never"]
DEFAULT_MAX_NEW_TOKENS = 1024
"""The value in Microsoft's samples. The default of transformers, 20 tokens, would cut most answers off."""
MAX_BEAMS = 64
MAX_NGRAM = 1024
MAX_PROMPT_LOOKUP = 64
DEFAULT_PROMPT_LOOKUP = 4
"""Tokens per draft: 4 save nearly as many decoder calls as 8 (`python -m benchmarks.cpu.speculation`)."""
MAX_LENGTH_PENALTY = 10
"""Beyond this, length ** penalty overflows float32 for the longest answers."""
MAX_FACTOR = 1e4
"""Greatest penalty, temperature or bias: scores must stay finite in float32."""
MAX_SEED = 2**63 - 1
MAX_FEW_BANNED = 16
"""Suppressed tokens that are worth naming one by one; more are banned in the whole row of scores (`SearchConfig.is_dense`),
since the 32 best tokens that a device returns would often be among them."""
DEFAULT_TOP_K = 50
"""As in transformers, which filters samples so unless `top_k` says otherwise."""


@dataclass(frozen=True)
class GenerationOptions:
    """Generation options of one call. None takes the checkpoint's value."""

    num_beams: int | None = None
    """Beams kept per prompt; 1 is greedy search, or sampling."""
    max_new_tokens: int | None = None
    """Most tokens to generate, end token included; at most the model's number of positions, which is the default where
    it is below 1024."""
    min_new_tokens: int | None = None
    """Fewest tokens to generate; the end tokens are banned before that."""
    length_penalty: float | None = None
    """A hypothesis scores its sum of log-probabilities / length ** length_penalty (beam search only)."""
    early_stopping: EarlyStopping | None = None
    """When beam search ends. True: at `num_beams` finished hypotheses. False: when a better one is unlikely. "never":
    when a better one is impossible."""
    no_repeat_ngram_size: int | None = None
    """Length of the n-grams that must not occur twice; 0 allows all."""
    forced_bos_token_id: int | None = None
    """Token forced in first position; -1 forces none."""
    forced_eos_token_id: int | Sequence[int] | None = None
    """Token forced in last position when the token limit is reached, or several to choose from; -1 forces none."""
    prompt_lookup_num_tokens: int | None = None
    """Most tokens drafted from the input and verified in one decoder call (greedy search only); 0 drafts none. Drafts
    save decoder calls and do not change the tokens."""
    eos_token_id: int | Sequence[int] | None = None
    """The token that ends an answer, or several of which each does."""
    min_length: int | None = None
    """As `min_new_tokens`, but the decoder start token counts; ignored where `min_new_tokens` is given, and at most the token
    limit."""
    repetition_penalty: float | None = None
    """Tokens that the answer has so far (the start token too) get their score divided by this where it is positive, and
    multiplied where it is negative; 1 changes nothing."""
    encoder_repetition_penalty: float | None = None
    """The reverse of it for the tokens of the prompt: above 1 makes them likelier. In beam search it changes the first beam only,
    as in transformers 4.57."""
    encoder_no_repeat_ngram_size: int | None = None
    """Length of the n-grams of the prompt that the answer must not repeat; 0 allows all."""
    bad_words_ids: Sequence[Sequence[int]] | None = None
    """Token sequences that must not occur; an empty list bans none."""
    suppress_tokens: Sequence[int] | None = None
    """Tokens that must not occur; an empty list bans none."""
    begin_suppress_tokens: Sequence[int] | None = None
    """Tokens that must not be the first one that is not forced; an empty list bans none."""
    sequence_bias: Mapping[Sequence[int], float] | Sequence[tuple[Sequence[int], float]] | None = None
    """Added to the score of the token that completes a sequence: `{(5, 7): -2.0}` or `[[[5, 7], -2.0]]`."""
    exponential_decay_length_penalty: tuple[int, float] | None = None
    """`(n, factor)`: from n new tokens on, the score of an end token grows by |score| * (factor ** (tokens beyond n) - 1)."""
    remove_invalid_values: bool | None = None
    """Whether NaN and infinities in scores are replaced by finite numbers."""
    renormalize_logits: bool | None = None
    """Whether scores are made log-probabilities again after all other settings (matters to beam search)."""
    do_sample: bool | None = None
    """Whether tokens are drawn at random; with `num_beams` above 1, the continuations of the beams are."""
    temperature: float | None = None
    """Scores are divided by it before a draw."""
    top_k: int | None = None
    """Only so many of the likeliest tokens can be drawn; 0 for all. 50 where neither call nor checkpoint says otherwise."""
    top_p: float | None = None
    """Only the likeliest tokens that together have this probability can be drawn; 1 for all."""
    min_p: float | None = None
    """Only tokens with at least this fraction of the likeliest one's probability can be drawn; 0 for all."""
    typical_p: float | None = None
    """Only the tokens nearest to the expected information, together of this probability, can be drawn; 1 for all."""
    epsilon_cutoff: float | None = None
    """Only tokens with at least this probability can be drawn; 0 for all."""
    eta_cutoff: float | None = None
    """As `epsilon_cutoff`, with a limit that falls as the entropy grows; 0 for all."""
    seed: int | None = None
    """Makes draws repeatable: equal seeds, prompts and images give equal answers, alone or in a batch. -1, or None where the
    checkpoint has none, draws anew at each call."""
    num_return_sequences: int | None = None
    """Answers per prompt, with `do_sample` or several beams: `Prediction.alternatives` has those after the first."""
    scores: bool | None = None
    """Whether to keep the probabilities of the tokens: `Prediction.token_logprobs`, and `score` of boxes and outlines. They are the
    model's own, before all other settings, and change no token."""
    constrain: Any = None
    """What the answer may be: a `Grammar`, a `Choice`, either in JSON (`{"boxes": {"labels": ["car"]}}`), or a function as transformers'
    `prefix_allowed_tokens_fn`: of the list of tokens so far it returns the ids of which one must follow. `{}` for anything."""


@dataclass(frozen=True)
class SearchConfig:
    """A complete and checked set of generation options; `GenerationOptions` says what each means."""

    decoder_start_token_id: int
    eos_token_id: int | tuple[int, ...]
    max_length: int
    """Most tokens in a sequence, decoder start token included."""
    num_beams: int = 1
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    no_repeat_ngram_size: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    prompt_lookup_num_tokens: int = 0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = DEFAULT_TOP_K
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    seed: int | None = None
    num_return_sequences: int = 1
    scores: bool = False
    location_ids: range | None = None
    """Ids of `<loc_0>` to `<loc_999>`, for `scores`; `Florence2` fills them in."""
    constrain: Any = None
    """A `constraints.Constraint` or `choice_search.Choices`, made by `Florence2` of what the option has; None for anything."""

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Every token that ends an answer."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def forced_end_tokens(self) -> tuple[int, ...]:
        """The tokens of which one is forced at the limit; none where nothing is."""
        forced = self.forced_eos_token_id
        return () if forced is None else forced if isinstance(forced, tuple) else (forced,)

    @property
    def is_dense(self) -> bool:
        """Whether a processor reads or changes whole rows of scores.

        Otherwise all processors amount to a few banned tokens or one forced token, for which the top-k scores of a device
        suffice.
        """
        suppressed = {*self.suppress_tokens, *self.begin_suppress_tokens}
        # transformers suppresses after it forces: a token that is both leaves a row of nothing but -inf
        is_contradictory = not suppressed.isdisjoint({*self.forced_end_tokens, self.forced_bos_token_id})
        return bool(
            self.do_sample
            or self.sequence_bias
            or self.repetition_penalty != 1
            or self.encoder_repetition_penalty != 1
            or self.exponential_decay_length_penalty
            or self.remove_invalid_values
            or self.renormalize_logits
            or len(self.forced_end_tokens) > 1
            or len(suppressed) > MAX_FEW_BANNED
            or is_contradictory
        )


@dataclass(frozen=True)
class GenerationDefaults:
    """Generation defaults of a checkpoint (`generation_config.json`), and the limits of its model."""

    decoder_start_token_id: int
    eos_token_id: int | tuple[int, ...]
    max_positions: int
    vocab_size: int
    options: GenerationOptions = GenerationOptions()

    def resolve(self, options: GenerationOptions | None) -> SearchConfig:
        """Merges the options of a call over the checkpoint's.

        Args:
            options: Options of the call; None takes the checkpoint's.

        Raises:
            OptionsError: A value is out of range or contradicts another.
        """
        if options is not None and not isinstance(options, GenerationOptions):
            raise OptionsError(f"options must be a GenerationOptions, got {type(options).__name__}")
        merged = self.options if options is None else merge(self.options, options)
        return _resolve(self, merged, options or GenerationOptions())


def merge(base: GenerationOptions, over: GenerationOptions) -> GenerationOptions:
    """The options of `base`, where `over` gives no others."""
    return replace(base, **{name: value for name, value in vars(over).items() if value is not None})


def _resolve(defaults: GenerationDefaults, merged: GenerationOptions, own: GenerationOptions) -> SearchConfig:
    """Args: own, what the call itself says; see `_min_new_tokens`."""
    limit, vocab = defaults.max_positions, defaults.vocab_size
    given: dict[str, Any] = {name: value for name, value in vars(merged).items() if value is not None}
    max_new = values.whole("max_new_tokens", given.get("max_new_tokens", min(DEFAULT_MAX_NEW_TOKENS, limit)), 1, limit)
    found = {name: _CHECKS[name](name, value, vocab) for name, value in given.items() if name in _CHECKS}
    config = SearchConfig(
        **{
            "eos_token_id": defaults.eos_token_id,
            "prompt_lookup_num_tokens": DEFAULT_PROMPT_LOOKUP,
            **found,
            "decoder_start_token_id": defaults.decoder_start_token_id,
            "max_length": 1 + max_new,
            "min_new_tokens": _min_new_tokens(merged, own, max_new),
        }
    )
    _check_number_of_answers(config)
    return config


def _min_new_tokens(merged: GenerationOptions, own: GenerationOptions, max_new: int) -> int:
    if merged.min_new_tokens is not None:
        return values.whole("min_new_tokens", merged.min_new_tokens, 0, max_new)
    # a checkpoint's minimum must not refuse calls for shorter answers: as in transformers, the limit wins
    most = 1 + max_new if own.min_length is not None else 2**31
    return min(max(0, values.whole("min_length", merged.min_length or 0, 0, most) - 1), max_new)


def _check_number_of_answers(config: SearchConfig) -> None:
    count = config.num_return_sequences
    if config.num_beams > 1 and count > config.num_beams:
        raise OptionsError(
            f"num_return_sequences is {count}, but {config.num_beams} beams find at most that many answers: raise num_beams"
        )
    if config.num_beams == 1 and count > 1 and not config.do_sample:
        raise OptionsError(
            f"num_return_sequences is {count}, but greedy search finds one answer: set do_sample, or num_beams to {count} or more"
        )


def _whole(low: int, high: int) -> values.Check:
    return lambda name, value, vocab: values.whole(name, value, low, high)


def _number(low: float, high: float, *, is_open: bool = False) -> values.Check:
    return lambda name, value, vocab: values.number(name, value, low, high, is_open=is_open)


def _early_stopping(name: str, value: Any, vocab: int) -> EarlyStopping:
    if isinstance(value, bool) or (isinstance(value, str) and value == "never"):
        return value  # type: ignore[return-value]
    raise OptionsError(f'early_stopping must be True, False or "never", got {value!r}')


_CHECKS: dict[str, values.Check] = {
    "num_beams": _whole(1, MAX_BEAMS),
    "length_penalty": _number(-MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY),
    "early_stopping": _early_stopping,
    "no_repeat_ngram_size": _whole(0, MAX_NGRAM),
    "encoder_no_repeat_ngram_size": _whole(0, MAX_NGRAM),
    "forced_bos_token_id": values.forced_token,
    "forced_eos_token_id": values.forced_tokens,
    "prompt_lookup_num_tokens": _whole(0, MAX_PROMPT_LOOKUP),
    "eos_token_id": values.one_or_several_tokens,
    "repetition_penalty": _number(0, MAX_FACTOR, is_open=True),
    "encoder_repetition_penalty": _number(0, MAX_FACTOR, is_open=True),
    "bad_words_ids": values.sequences,
    "suppress_tokens": values.tokens,
    "begin_suppress_tokens": values.tokens,
    "sequence_bias": values.biases,
    "exponential_decay_length_penalty": values.decay,
    "remove_invalid_values": values.flag,
    "renormalize_logits": values.flag,
    "do_sample": values.flag,
    "temperature": _number(0, MAX_FACTOR, is_open=True),
    "top_k": _whole(0, 2**31),
    "top_p": _number(0, 1),
    "min_p": _number(0, 1),
    "typical_p": _number(0, 1, is_open=True),
    "epsilon_cutoff": _number(0, 1),
    "eta_cutoff": _number(0, 1),
    "seed": lambda name, value, vocab: values.seed(name, value, MAX_SEED),
    "num_return_sequences": _whole(1, MAX_BEAMS),
    "scores": values.flag,
    "constrain": lambda name, value, vocab: value or None,  # read where the tokenizer is known
}
OPTION_NAMES = tuple(each.name for each in fields(GenerationOptions))
