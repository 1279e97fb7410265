"""The generation loop: a search chooses tokens, a decoder session computes the logits after them.

Everything here works on token ids and logits; text never appears. The searches reproduce `generate` of transformers
4.57 token for token. Prompts of a batch are independent of each other, so a finished prompt leaves the batch at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from florence_onnx.generation.beam_search import BeamSearch
from florence_onnx.generation.choice_search import Choices, ChoiceSearch
from florence_onnx.generation.greedy_search import GreedySearch
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.progress import Progress
from florence_onnx.generation.sampling import SampleSearch
from florence_onnx.generation.scores import AllScores
from florence_onnx.generation.search import Floats, GeneratedSequence, Ids, Search


class DecoderSession(Protocol):
    """A decoder with the cross KV of some encoded prompts and the self KV cache of their rows."""

    def step(self, token_ids: Ids) -> Floats:
        """Runs a decode step.

        Args:
            token_ids: `(rows, S)`, tokens that every row is fed.

        Returns:
            Logits `(rows, V)` after the last token; valid until the next step, and the caller may overwrite them.
        """

    def reorder(self, rows: Ids, prompts: Ids) -> None:
        """Makes new row i continue the history of old row `rows[i]`.

        Args:
            rows: `(R,)`; rows of one prompt are adjacent, and every prompt has the same number of them.
            prompts: `(P,)`, the current indices of the prompts that stay, increasing.
        """


@runtime_checkable
class VerifyingSession(DecoderSession, Protocol):
    """A session that can score several tokens of a row in one call and then forget some of them (speculative decoding).

    A search drafts d1, d2, d3 behind its last token t and has all four fed at once:

    ```text
    fed        t     d1    d2    d3
    choice     d1    x     -     -      by the logits after each
    ```

    The choice after t is d1, so that draft is accepted, and the logits after it are valid as well: they choose x. x is
    not d2, so the logits behind d2 were computed from a wrong history. The search keeps two tokens (t, d1) and feeds x
    next: one call gave two tokens, and they are those of decoding one at a time.
    """

    def verify(self, token_ids: Ids) -> Floats:
        """Like `step`, but returns the logits `(rows, S, V)` after each of the tokens `(rows, S)`."""

    def keep(self, counts: Ids) -> None:
        """Keeps the first tokens of each row that the last `verify` fed, and drops the others from the cache.

        Args:
            counts: `(rows,)`, at least 1 each.
        """


def generate(
    session: DecoderSession,
    num_prompts: int,
    config: SearchConfig,
    lookup_ids: Sequence[Sequence[int]] | None = None,
    encoder_ids: Sequence[Sequence[int]] | None = None,
) -> list[GeneratedSequence]:
    """Generates the answer to every prompt of a session.

    Args:
        session: Decoder with `num_prompts` encoded prompts and an empty self KV cache.
        num_prompts: Number of prompts.
        config: How to search.
        lookup_ids: As for `new_search`; ignored unless the session is a `VerifyingSession`.
        encoder_ids: As for `new_search`.

    Returns:
        One sequence per prompt.
    """
    can_verify = isinstance(session, VerifyingSession)
    return drive(session, new_search(num_prompts, config, lookup_ids if can_verify else None, encoder_ids))


def new_search(
    num_prompts: int,
    config: SearchConfig,
    lookup_ids: Sequence[Sequence[int]] | None,
    encoder_ids: Sequence[Sequence[int]] | None = None,
    progress: Sequence[Progress] | None = None,
) -> Search:
    """Makes the search that a configuration asks for.

    Greedy search drafts tokens by prompt lookup where it has tokens to look up. A draft never changes the choice: every
    token is the greedy one, after all processors, given the tokens before it. It may change the rounding of the logits,
    because a matrix product over several rows sums in another order than one over a single row. Where two tokens are
    equally likely to within that rounding (about 1e-6 of the logits in fp32; more where activations are quantized with
    one scale for all rows of a call) either may be chosen, as on a different machine.

    Args:
        num_prompts: Number of prompts.
        config: How to search.
        lookup_ids: For each prompt the token ids that its answer may repeat (a caption, a region), spelled as the
            answer would spell them; None for no drafts, with decoders that cannot verify them.
        encoder_ids: For each prompt the token ids that the text encoder was fed, image tokens included; for the processors
            that look at the prompt.
        progress: For each prompt who follows its answer and what may end it early; None for nobody and nothing.
    """
    if isinstance(config.constrain, Choices):
        return ChoiceSearch(num_prompts, config, config.constrain, progress)
    if config.num_beams > 1:
        return BeamSearch(num_prompts, config, encoder_ids, progress)
    if config.do_sample:
        return SampleSearch(num_prompts, config, encoder_ids, progress)
    return GreedySearch(num_prompts, config, lookup_ids, encoder_ids, progress)


def drive(session: DecoderSession, search: Search) -> list[GeneratedSequence]:
    """Alternates between a session and a search until the search is finished.

    Args:
        session: Decoder with encoded prompts and an empty self KV cache.
        search: A search for the same number of prompts.

    Returns:
        One sequence per prompt.
    """
    verifying = session if isinstance(session, VerifyingSession) else None
    scores = AllScores().read(session.step(search.start())[:, None])
    while (step := search.advance(scores)) is not None:
        # `keep` speaks of the rows as they were fed, so it comes before they are reordered
        if step.kept is not None and verifying is not None:
            verifying.keep(step.kept)
        session.reorder(step.rows, step.prompts)
        if verifying is not None and step.token_ids.shape[1] > 1:
            scores.read(verifying.verify(step.token_ids))
        else:
            scores.read(session.step(step.token_ids)[:, None])
    return search.results()
