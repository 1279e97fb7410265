"""How tokens are generated: the loop that drives a decoder by a search.

Everything here works on token ids and logits; text never appears. The searches reproduce `generate` of transformers
4.57 token for token. Prompts of a batch do not influence each other, so a finished prompt leaves the batch at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from florence_onnx.generation.beam_search import BeamSearch
from florence_onnx.generation.greedy_search import GreedySearch
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.scores import AllScores
from florence_onnx.generation.search import Floats, GeneratedSequence, Ids, Search


class DecoderSession(Protocol):
    """A decoder with the encoder's output of some prompts and a cache for the rows in flight."""

    def step(self, token_ids: Ids) -> Floats:
        """Feeds tokens `(rows, S)` and returns the logits `(rows, V)` after the last.

        They are valid until the next step, and may be overwritten.
        """

    def reorder(self, rows: Ids, prompts: Ids) -> None:
        """Lets new row i continue old row `rows[i]`.

        Args:
            rows: `(R,)`; rows of one prompt are adjacent and every prompt has equally many.
            prompts: `(P,)`, increasing; the prompts, in their present numbering, that stay.
        """


@runtime_checkable
class VerifyingSession(DecoderSession, Protocol):
    """A session that can try several tokens in one call and forget those that were wrong."""

    def verify(self, token_ids: Ids) -> Floats:
        """Feeds tokens `(rows, S)` and returns the logits `(rows, S, V)` after each, as `step` does."""

    def keep(self, counts: Ids) -> None:
        """Keeps the first tokens that the last `verify` fed, and forgets the others.

        Args:
            counts: `(rows,)`, at least 1 each.
        """


def generate(
    session: DecoderSession,
    num_prompts: int,
    config: SearchConfig,
    given: Sequence[Sequence[int]] | None = None,
) -> list[GeneratedSequence]:
    """Decodes every prompt of a session.

    Args:
        session: Decoder that holds `num_prompts` encoded prompts and no token yet.
        num_prompts: Number of prompts.
        config: How to search.
        given: As for `new_search`; only a `VerifyingSession` makes use of it.

    Returns:
        One sequence per prompt.
    """
    return drive(session, new_search(num_prompts, config, given if isinstance(session, VerifyingSession) else None))


def new_search(num_prompts: int, config: SearchConfig, given: Sequence[Sequence[int]] | None) -> Search:
    """The search that a configuration asks for.

    Greedy search drafts tokens by prompt lookup where it is given something. A draft never changes what is
    chosen: every token is the greedy choice, with all processors, after the tokens before it. What a draft may change
    is the rounding of that choice's logits, because a product of several rows sums in another order than that of one;
    between tokens that are equally likely to within that rounding (about 1e-6 of the logits in fp32; more where
    activations are quantized over all rows of a call) either may come out, as it may on another machine.

    Args:
        num_prompts: Number of prompts.
        config: How to search.
        given: For each prompt, token ids that its answer may repeat (a caption, a region), as the answer would write
            them; None: no drafts, for decoders that cannot verify them.
    """
    if config.num_beams > 1:
        return BeamSearch(num_prompts, config)
    return GreedySearch(num_prompts, config, given)


def drive(session: DecoderSession, search: Search) -> list[GeneratedSequence]:
    """Steps a session through a search.

    Args:
        session: Decoder that holds the prompts and no token yet.
        search: Of as many prompts.

    Returns:
        One sequence per prompt.
    """
    verifying = session if isinstance(session, VerifyingSession) else None
    scores = AllScores().read(session.step(search.start())[:, None])
    while (continuation := search.advance(scores)) is not None:
        if continuation.kept is not None and verifying is not None:
            verifying.keep(continuation.kept)
        session.reorder(continuation.rows, continuation.prompts)
        if verifying is not None and continuation.token_ids.shape[1] > 1:
            scores.read(verifying.verify(continuation.token_ids))
        else:
            scores.read(session.step(continuation.token_ids)[:, None])
    return search.results()
