"""Florence-2's tokenizer: BART's byte-level BPE plus the 1024 tokens that Microsoft's processor adds in code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from florence_onnx.errors import CheckpointError

from .json_files import read_json, refuse_pointer

NUM_LOCATIONS = 1000

ADDED_TOKENS: tuple[str, ...] = (
    "<od>",
    "</od>",
    "<ocr>",
    "</ocr>",
    *(f"<loc_{index}>" for index in range(NUM_LOCATIONS)),
    "<cap>",
    "</cap>",
    "<ncap>",
    "</ncap>",
    "<dcap>",
    "</dcap>",
    "<grounding>",
    "</grounding>",
    "<seg>",
    "</seg>",
    "<sep>",
    "<region_cap>",
    "</region_cap>",
    "<region_to_desciption>",
    "</region_to_desciption>",
    "<proposal>",
    "</proposal>",
    "<poly>",
    "</poly>",
    "<and>",
)
"""In the order of their ids. The spelling `desciption` is that of the checkpoints."""

_BART_ENTRIES = 50265
"""Entries of BART's vocabulary; in full-size checkpoints the added tokens follow them."""
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
SPECIAL_TOKENS = {"bos_token_id": "<s>", "pad_token_id": "<pad>", "eos_token_id": "</s>"}
"""Which token of the tokenizer each id of a config means."""


def load_tokenizer(folder: Path, vocab_size: int, token_ids: Mapping[str, int | Sequence[int]]) -> Tokenizer:
    """Loads the tokenizer of a checkpoint, with all of Florence-2's tokens at the ids used in training.

    Args:
        folder: Has tokenizer.json, or vocab.json and merges.txt, with or without added_tokens.json.
        vocab_size: Rows of the embedding. All ids must be smaller, except that of `<image>`, which is never embedded.
        token_ids: The config's `bos_token_id`, `pad_token_id` and `eos_token_id`; of several, one must be the
            tokenizer's.

    Returns:
        A tokenizer without padding and truncation that wraps a prompt as `<s>…</s>`. Extra tokens of a fine-tune are
        kept.

    Raises:
        CheckpointError: There is no tokenizer, it cannot be read, or its ids do not fit the config.
    """
    tokenizer = _read(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _add_missing(tokenizer, folder)
    _check_ids(tokenizer, folder, vocab_size)
    _check_wrapping(tokenizer, folder, token_ids)
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer."""
    has_parts = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return has_parts or (folder / "tokenizer.json").is_file()


def _read(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    for file in (path, vocab, merges):
        if file.is_file():
            refuse_pointer(file)
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        if vocab.is_file() and merges.is_file():
            return _build(folder, vocab, merges)
    except Exception as error:
        # tokenizers raises a bare `Exception` for every fault of a file.
        if type(error) is not Exception:
            raise
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error
    raise CheckpointError(
        f"{folder} has no tokenizer.json (nor vocab.json and merges.txt); take it from the base model: "
        "--processor microsoft/Florence-2-base"
    )


def _build(folder: Path, vocab: Path, merges: Path) -> Tokenizer:
    """Builds from vocab.json and merges.txt the tokenizer that transformers builds from them for BART."""
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    known = read_json(folder, vocab.name) or {}
    if missing := [token for token in _SPECIAL if token not in known]:
        raise CheckpointError(f"{vocab} lacks {', '.join(missing)}")
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", known["</s>"]), ("<s>", known["<s>"]), trim_offsets=True, add_prefix_space=False
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=True) for token in _SPECIAL])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=True)])
    _add_listed(tokenizer, folder)
    return tokenizer


def _add_listed(tokenizer: Tokenizer, folder: Path) -> None:
    """Adds the tokens of added_tokens.json, which transformers' slow tokenizers write beside vocab.json."""
    listed = read_json(folder, "added_tokens.json") or {}
    for token, wanted in sorted(listed.items(), key=lambda item: int(item[1])):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != wanted:
            raise CheckpointError(
                f"{folder}/added_tokens.json wants {token} at {wanted}, which leaves a gap in the ids"
            )


def _add_missing(tokenizer: Tokenizer, folder: Path) -> None:
    missing = [token for token in ADDED_TOKENS if tokenizer.token_to_id(token) is None]
    if len(missing) not in (0, len(ADDED_TOKENS)):
        raise CheckpointError(
            f"the tokenizer in {folder} has some of Florence-2's tokens but lacks {len(missing)}: "
            f"{', '.join(missing[:10])}"
        )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in missing])


def _check_ids(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    first = tokenizer.token_to_id(ADDED_TOKENS[0])
    wrong = [token for index, token in enumerate(ADDED_TOKENS) if tokenizer.token_to_id(token) != first + index]
    if wrong:
        raise CheckpointError(
            f"the tokenizer in {folder} has Florence-2's tokens in another order: {len(wrong)} do not follow <od> "
            f"({first}), first {', '.join(wrong[:10])}"
        )
    if vocab_size >= _BART_ENTRIES + len(ADDED_TOKENS) and first != _BART_ENTRIES:
        raise CheckpointError(
            f"the tokenizer in {folder} has <od> at {first}, but a vocabulary of {vocab_size} has it at "
            f"{_BART_ENTRIES}; "
            "use the tokenizer of the checkpoint's base model"
        )
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= vocab_size and token != "<image>"]
    if beyond:
        raise CheckpointError(
            f"{len(beyond)} tokens of the tokenizer in {folder} have no row in the embedding of {vocab_size} rows: "
            f"{', '.join(sorted(beyond)[:10])}"
        )


def _check_wrapping(tokenizer: Tokenizer, folder: Path, token_ids: Mapping[str, int | Sequence[int]]) -> None:
    for name, token in SPECIAL_TOKENS.items():
        stated = token_ids[name]
        found = tokenizer.token_to_id(token)
        if found not in ([stated] if isinstance(stated, int) else stated):
            raise CheckpointError(f"config.json says {name} {stated}, the tokenizer in {folder} has {token} at {found}")
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    ids = tokenizer.encode("a").ids
    if ids[:1] != [bos] or ids[-1:] != [eos] or len(ids) < 3:
        raise CheckpointError(f"the tokenizer in {folder} does not wrap a prompt as <s>…</s>: 'a' becomes {ids}")
