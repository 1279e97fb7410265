"""What answers may look like: grammars of Florence-2's answers and lists of choices, and what they become as tokens.

```text
Grammar, Choice ─GrammarCompiler.compile─▶ Automaton, Choices ─▶ the searches of `generation`
```

A label or choice is spelled as the model's answers spell it: its white space at both ends is removed, its case is kept, and it is
encoded as it stands behind `<s>` or a location token, without a blank in front (`car` is another token than ` car`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from florence_onnx.answers import postprocess
from florence_onnx.bundles.tokenizer import PromptTokenizer
from florence_onnx.errors import OptionsError, UnknownTaskError
from florence_onnx.generation.automaton import END, Arc, Automaton
from florence_onnx.generation.choice_search import Choices
from florence_onnx.generation.constraints import Constraint, Ids, PrefixFunction
from florence_onnx.generation.options import SearchConfig
from florence_onnx.tasks import Task
from florence_onnx.tasks import get as get_task

T = TypeVar("T")
Kind = Literal["boxes", "quads", "polygons", "boxes_or_polygons", "text"]
MAX_LABELS = 10_000
MAX_LABEL_LENGTH = 1000
"""Characters of a label or choice."""
_TASK_KINDS: dict[Callable[..., Any], tuple[Kind, bool]] = {
    postprocess.description_with_bboxes: ("boxes", True),
    postprocess.phrase_grounding: ("boxes", True),
    postprocess.bboxes: ("boxes", False),
    postprocess.ocr: ("quads", True),
    postprocess.polygons: ("polygons", False),
    postprocess.description_with_polygons: ("polygons", True),
    postprocess.description_with_bboxes_or_polygons: ("boxes_or_polygons", True),
}
"""For each parser of geometry what it reads, and whether that has labels."""


@dataclass(frozen=True)
class Grammar:
    """The form of an answer. Make one by `boxes`, `quads`, `polygons`, `text` or `for_task`.

    All of them also allow the empty answer, except `text`. An answer always ends in time: near the token limit only what leaves room
    to complete it is allowed.
    """

    kind: Kind
    """What the answer consists of."""
    labels: tuple[str, ...] | None = None
    """The labels that may occur; None for any text, empty for no labels."""
    has_region: bool = False
    """Whether four location tokens may follow a text, as in the answers about a region."""

    @classmethod
    def boxes(cls, labels: Iterable[str] | None = None) -> Grammar:
        """Labels with boxes: a label, then four location tokens with x2 ≥ x1 and y2 ≥ y1 for each of its boxes.

        Args:
            labels: Those that may occur, in any order and number; None for any text; empty for boxes without labels.

        Raises:
            OptionsError: A label cannot be one: it is blank, not a string, given twice, too long, or has `<` or a line break.
        """
        return cls("boxes", _read_labels(labels))

    @classmethod
    def quads(cls, labels: Iterable[str] | None = None) -> Grammar:
        """Lines of text, each with the eight location tokens of its corners.

        Args:
            labels: The lines that may occur; None for any text.

        Raises:
            OptionsError: As for `boxes`, or there are none.
        """
        read = _read_labels(labels)
        if read == ():
            raise OptionsError("constrain: quads need text in front of them; pass labels=None for any text")
        return cls("quads", read)

    @classmethod
    def polygons(cls, labels: Iterable[str] | None = ()) -> Grammar:
        """Outlines of an even number of location tokens, at least six, with `<sep>` between the parts of an object.

        Args:
            labels: Those in front of outlines, in `<poly>` and `</poly>`; empty for outlines without labels, with these marks or
                without; None for any text.

        Raises:
            OptionsError: As for `boxes`.
        """
        return cls("polygons", _read_labels(labels))

    @classmethod
    def text(cls, *, has_region: bool = False) -> Grammar:
        """Text of at least one token and without location tokens.

        Args:
            has_region: Whether four location tokens may follow it.
        """
        return cls("text", None, has_region)

    @classmethod
    def for_task(cls, task: Task[Any] | str, labels: Iterable[str] | None = None) -> Grammar:
        """What a task's parser reads.

        Args:
            task: As for `Florence2.run`.
            labels: Those that may occur in its answer; None for any text.

        Raises:
            OptionsError: The task has a parser of its own, or `labels` are given and its answer has none.
            UnknownTaskError: There is no such task.
        """
        found = get_task(task)
        if found.parser is postprocess.pure_text:
            if labels is not None:
                raise OptionsError(f"constrain: the answer to {found.slug} is text without labels; use Choice([…])")
            return cls.text(has_region=found.takes_region)
        if found.parser not in _TASK_KINDS:
            raise OptionsError(
                f"constrain: {found.slug} has a parser of its own; use Grammar.boxes, quads, polygons or text, or a function"
            )
        kind, has_labels = _TASK_KINDS[found.parser]
        read = _read_labels(labels)
        if read is not None and not has_labels:
            raise OptionsError(f"constrain: the answer to {found.slug} has no labels")
        if read == ():
            raise OptionsError(f"constrain: the answer to {found.slug} has labels, and none is given")
        return cls(kind, read if has_labels else ())


@dataclass(frozen=True)
class Choice:
    """An answer that is exactly one of some texts: the likeliest one. `Prediction.choice_logprobs` has those of all.

    Beams, drafts and logits processors play no part; `do_sample` draws a choice, and `num_return_sequences` gives further ones.
    """

    choices: Sequence[str]
    """The texts; a list is kept as a tuple."""
    has_region: bool = False
    """Whether the model writes location tokens behind its text, as it does about a region: then a choice's log-probability is that of its
    tokens followed by the end or by any location. Otherwise it is that of its tokens and the end."""

    def __post_init__(self) -> None:
        read = _read_texts(self.choices, "choice")
        if not read:
            raise OptionsError("constrain: a Choice needs at least one text")
        object.__setattr__(self, "choices", read)


def read_constrain(value: Any, own: Mapping[str, Task[Any]]) -> Grammar | Choice | Callable[..., Any]:
    """Reads the option `constrain`.

    Args:
        value: A grammar, a choice, a function, or JSON: an object with one field, `boxes`, `quads`, `polygons` or `text` (an object of
            the arguments of `Grammar`'s method of that name), `task` (a slug or token, or an object with `name` and `labels`) or
            `choices` (a list, or an object with `choices` and `has_region`).
        own: The tasks of the bundle by slug.

    Raises:
        OptionsError: It is none of these.
        UnknownTaskError: There is no such task.
    """
    if isinstance(value, Grammar | Choice):
        return value
    if callable(value):
        function: Callable[..., Any] = value
        return function
    if not isinstance(value, Mapping) or len(value) != 1:
        raise OptionsError(
            'constrain must be a Grammar, a Choice, a function, or an object such as {"boxes": {"labels": ["car"]}} or '
            f'{{"choices": ["yes", "no"]}}, got {value!r:.200}'
        )
    ((name, given),) = value.items()
    if name == "choices":
        if isinstance(given, Mapping):
            return _call("choices", Choice, given, {"choices", "has_region"})
        return Choice(given)
    if name == "task":
        chosen = dict(given) if isinstance(given, Mapping) else {"name": given}
        task = get_task(chosen.pop("name", None), own)
        return _call("task", functools.partial(Grammar.for_task, task), chosen, {"labels"})
    makers: dict[Any, tuple[Callable[..., Grammar], set[str]]] = {
        "boxes": (Grammar.boxes, {"labels"}),
        "quads": (Grammar.quads, {"labels"}),
        "polygons": (Grammar.polygons, {"labels"}),
        "text": (Grammar.text, {"has_region"}),
    }
    if name not in makers:
        raise OptionsError(f"constrain has {', '.join([*makers, 'task'])} or choices, got {name!r}")
    return _call(name, makers[name][0], given, makers[name][1])


def _call(name: str, make: Callable[..., T], given: Any, known: set[str]) -> T:
    if not isinstance(given, Mapping) or not set(given) <= known or (name == "choices" and name not in given):
        raise OptionsError(f"constrain: {name} takes an object with {' and '.join(sorted(known))}, got {given!r:.200}")
    if not isinstance(given.get("has_region", False), bool):
        raise OptionsError(f"constrain: has_region must be true or false, got {given['has_region']!r:.200}")
    return make(**given)


def _read_labels(labels: Iterable[str] | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    read = _read_texts(labels, "label")
    for label in read:
        if "<" in label or "\n" in label:
            raise OptionsError(f"constrain: a label has neither < nor a line break, got {label!r:.100}")
    return read


def _read_texts(texts: Any, name: str) -> tuple[str, ...]:
    """Strips and checks labels or choices."""
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise OptionsError(f"constrain: {name}s must be a list of strings, got {texts!r:.100}")
    read: list[str] = []
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise OptionsError(f"constrain: each {name} must be text that is not blank, got {text!r:.100}")
        if len(text) > MAX_LABEL_LENGTH:
            raise OptionsError(f"constrain: a {name} has at most {MAX_LABEL_LENGTH} characters, got {len(text)}")
        read.append(text.strip())
    twice = next((text for text in read if read.count(text) > 1), None) if len(set(read)) < len(read) else None
    if twice is not None:
        raise OptionsError(f"constrain: {name} {twice!r:.100} is given twice")
    if len(read) > MAX_LABELS:
        raise OptionsError(f"constrain takes at most {MAX_LABELS} {name}s, got {len(read)}")
    return tuple(read)


# ----------------------------------------------------------------------------------------------------------- compiling


class GrammarCompiler:
    """Turns grammars and choices into what searches follow, for one model."""

    def __init__(self, tokenizer: PromptTokenizer, vocab_size: int, own: Mapping[str, Task[Any]]) -> None:
        """Args:
        tokenizer: The model's.
        vocab_size: V of the model, which may be more than the tokenizer's.
        own: The tasks of the bundle by slug.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._own = own
        # compiling takes milliseconds, and a grammar is usually asked for again
        self._compiled = functools.lru_cache(maxsize=32)(self._compile)

    def compile(self, config: SearchConfig) -> Constraint | Choices:
        """What the searches follow.

        Args:
            config: Whose `constrain` is the value of the option.

        Raises:
            OptionsError: The value is none, the model's vocabulary cannot spell it, or no answer fits into the token limit.
        """
        try:
            value = read_constrain(config.constrain, self._own)
        except UnknownTaskError as error:
            raise OptionsError(f"constrain: {error}") from error
        if not isinstance(value, Grammar | Choice):
            return PrefixFunction(value, self._vocab_size)
        found = self._compiled(value, config.end_tokens)
        found.check(config.max_length - 1, has_bos=config.forced_bos_token_id is not None)
        return found

    def _compile(self, value: Grammar | Choice, end_tokens: tuple[int, ...]) -> Automaton | Choices:
        if isinstance(value, Choice):
            closing = self._tokenizer.location_ids or range(0) if value.has_region else range(0)
            return Choices(tuple(self._spell(choice, "choice") for choice in value.choices), tuple(closing))
        builder = _Builder(self._tokenizer, value, end_tokens, self._text, self._spell)
        return builder.build()

    def _spell(self, text: str, name: str) -> tuple[int, ...]:
        """The tokens of a label or choice, as an answer has them.

        Raises:
            OptionsError: They read otherwise, or are not text.
        """
        try:
            tokens = tuple(self._tokenizer.encode_text(text))
        except TypeError as error:  # a lone surrogate
            raise OptionsError(f"constrain: {name} {text!r:.100} is not valid Unicode") from error
        is_text = all(token in self._tokenizer.text_tokens and token < self._vocab_size for token in tokens)
        if not is_text or postprocess.pure_text(self._tokenizer.decode(tokens), (1, 1)) != text:
            raise OptionsError(f"constrain: the model's vocabulary cannot spell {name} {text!r:.100}")
        return tokens

    @functools.cached_property
    def _text(self) -> _Text:
        texts = {token: text for token, text in self._tokenizer.text_tokens.items() if token < self._vocab_size}
        return _Text.read(texts)


Utf8 = tuple[int, int, int]
"""Within a character: how many bytes it still has, and the least and greatest next one."""
_COMPLETE: Utf8 = (0, 0, 0)


def _after_byte(state: Utf8, byte: int) -> Utf8 | None:
    """The state after a byte (RFC 3629, section 4); None where text cannot go on like that."""
    left, least, greatest = state
    if left:
        return (left - 1, 0x80 if left > 1 else 0, 0xBF if left > 1 else 0) if least <= byte <= greatest else None
    if byte < 0x80:
        return _COMPLETE
    special = {0xE0: (2, 0xA0, 0xBF), 0xED: (2, 0x80, 0x9F), 0xF0: (3, 0x90, 0xBF), 0xF4: (3, 0x80, 0x8F)}
    if byte in special:
        return special[byte]
    for first, last, more in ((0xC2, 0xDF, 1), (0xE1, 0xEF, 2), (0xF1, 0xF3, 3)):
        if first <= byte <= last:
            return more, 0x80, 0xBF
    return None


def _after_bytes(state: Utf8, text: bytes) -> Utf8 | None:
    found: Utf8 | None = state
    for byte in text:
        if found is not None:
            found = _after_byte(found, byte)
    return found


Place = Utf8 | bytes
"""Within a text: the state of its present character, or its bytes so far where those may still become white space alone."""
_BLANK_CHARACTERS = [chr(code) for code in range(0x80, 0x3001) if chr(code).isspace()]
_MAYBE_BLANK = {b""} | {
    character.encode()[:end] for character in _BLANK_CHARACTERS for end in range(1, len(character.encode()))
}


@dataclass(frozen=True)
class _Text:
    """All tokens of text, by what they do to the character that is being spelled."""

    arcs: Mapping[Place, Mapping[Place, Ids]]
    """From a place to the next one; a text starts at `b""` and may end at `_COMPLETE`, which it reaches with its first character that is
    not white space."""
    barred: Ids
    """Tokens with `<` or a control character, which labels must not have."""

    @classmethod
    def read(cls, tokens: Mapping[int, bytes]) -> _Text:
        """Args: tokens, the bytes of each."""
        plain = [token for token, text in tokens.items() if text.isascii()]
        odd = {token: text for token, text in tokens.items() if not text.isascii()}
        visible = [token for token in plain if tokens[token].decode().strip()]
        found: dict[Place, dict[Place, list[int]]] = {_COMPLETE: {_COMPLETE: plain}, b"": {_COMPLETE: visible}}
        waiting: list[Place] = [_COMPLETE, b""]
        while waiting:
            place = waiting.pop()
            for token, text in odd.items():
                after = _after_first(place + text) if isinstance(place, bytes) else _after_bytes(place, text)
                if after is None:
                    continue
                found[place].setdefault(after, []).append(token)
                if after not in found:
                    found[after] = {}
                    waiting.append(after)
        arcs = {before: {after: _ids(ids) for after, ids in each.items()} for before, each in found.items()}
        return cls(
            arcs, _ids(token for token, text in tokens.items() if min(text, default=0) < 0x20 or _BARRED & set(text))
        )


_BARRED = {ord("<"), 0x7F}


def _after_first(text: bytes) -> Place | None:
    """The place behind the first bytes of a text; None where no text begins so, or where they are white space alone."""
    if text in _MAYBE_BLANK:
        return text
    state = _after_bytes(_COMPLETE, text)
    if state is None:
        return None
    characters = text.decode(errors="ignore")  # without the one that is not complete
    return state if characters.strip() or (not characters and state != _COMPLETE) else None


def _ids(tokens: Iterable[int]) -> Ids:
    return np.unique(np.array(list(tokens), dtype=np.int64))


@dataclass
class _Builder:
    """Draws the graph of one grammar. Nodes are numbers; a method that takes `targets` adds arcs to what lies behind."""

    tokenizer: PromptTokenizer
    grammar: Grammar
    end_tokens: tuple[int, ...]
    text: _Text
    spell: Callable[[str, str], tuple[int, ...]]
    arcs: dict[int, list[Arc]] = field(default_factory=dict)

    def build(self) -> Automaton:
        """Draws it.

        Raises:
            OptionsError: The vocabulary lacks a token that it needs.
        """
        start = self._node()
        getattr(self, f"_draw_{self.grammar.kind}")(start)
        first = self._node()
        self.arcs[first] = list(self.arcs[start])
        bos = self.tokenizer.token_id("<s>")
        if bos is not None and bos not in self.end_tokens:
            self._add(first, [bos], start)
        return Automaton(self.arcs, first=first, after_bos=start, end_tokens=self.end_tokens)

    def _node(self) -> int:
        self.arcs[len(self.arcs)] = []
        return len(self.arcs) - 1

    def _add(self, node: int, ids: Iterable[int] | Ids, target: int, *, is_ordered: bool = False) -> None:
        self.arcs[node].append(Arc(_ids(ids), target, is_ordered))

    def _end(self, node: int) -> None:
        self._add(node, self.end_tokens, END)

    @functools.cached_property
    def _locations(self) -> range:
        found = self.tokenizer.location_ids
        if found is None:
            raise OptionsError(
                "constrain: this model's vocabulary has no location tokens <loc_0> to <loc_999> in a row"
            )
        return found

    def _mark(self, name: str) -> int:
        found = self.tokenizer.token_id(name)
        if found is None:
            raise OptionsError(f"constrain: this model's vocabulary has no token {name}")
        return found

    def _run(self, node: int, count: int, *, is_box: bool = False) -> int:
        """Location tokens from a node on; returns the node behind them."""
        for place in range(count):
            following = self._node()
            self._add(node, self._locations, following, is_ordered=is_box and place > 1)
            node = following
        return node

    # ------------------------------------------------------------------------------------------------------------ labels

    def _draw_label(self, node: int) -> int:
        """A label from a node on; returns a node behind it, whose arcs are those of what follows all labels."""
        behind = self._node()
        if self.grammar.labels is None:
            self._draw_free_label(node, behind)
        else:
            self._draw_trie(node, [self.spell(label, "label") for label in self.grammar.labels], behind)
        return behind

    def _draw_trie(self, node: int, labels: Sequence[tuple[int, ...]], behind: int) -> None:
        nodes: dict[tuple[int, ...], int] = {(): node}
        for label in labels:
            for end in range(1, len(label) + 1):
                prefix = label[:end]
                if prefix not in nodes:
                    nodes[prefix] = self._node()
                    self._add(nodes[prefix[:-1]], [prefix[-1]], nodes[prefix])
        self._behind.setdefault(behind, []).extend(nodes[label] for label in labels)

    def _draw_free_label(self, node: int, behind: int) -> None:
        self._behind.setdefault(behind, []).append(self._draw_any_text(node, self.text.barred))

    def _draw_any_text(self, node: int, barred: Ids) -> int:
        """Text without some tokens from a node on; returns the node where it may end."""
        nodes = {place: node if place == b"" else self._node() for place in self.text.arcs}
        for place, arcs in self.text.arcs.items():
            for after, ids in arcs.items():
                self._add_some(nodes[place], np.setdiff1d(ids, barred), nodes[after])
        return nodes[_COMPLETE]

    def _add_some(self, node: int, ids: Ids, target: int) -> None:
        if len(ids):
            self._add(node, ids, target)

    @functools.cached_property
    def _behind(self) -> dict[int, list[int]]:
        """Of each node that `_draw_label` has returned, the last nodes of its labels."""
        return {}

    def _share(self, behind: int) -> None:
        """Gives the last nodes of all labels the arcs of the node behind them, which are complete now."""
        for node in self._behind.pop(behind):
            self.arcs[node].extend(self.arcs[behind])

    # ------------------------------------------------------------------------------------------------------------- kinds

    def _draw_boxes(self, start: int) -> None:
        self._end(start)
        if self.grammar.labels == ():
            self._repeat(start, self._run(start, 4, is_box=True))
            return
        behind = self._draw_label(start)
        self._draw_labelled_boxes(start, behind)
        self._share(behind)

    def _draw_labelled_boxes(self, start: int, behind: int) -> None:
        complete = self._run(behind, 4, is_box=True)
        self._repeat(start, complete)
        self._repeat(behind, complete)

    def _repeat(self, node: int, complete: int) -> None:
        """Lets what follows a node follow another one too."""
        self.arcs[complete].extend(self.arcs[node])

    def _draw_quads(self, start: int) -> None:
        self._end(start)
        behind = self._draw_label(start)
        self._repeat(start, self._run(behind, 8))
        self._share(behind)

    def _draw_polygons(self, start: int) -> None:
        self._end(start)
        if self.grammar.labels == ():
            self._draw_outlines(start, self._end)
            complete = self._draw_marked_outlines(start)
            self._end(complete)
            return
        behind = self._draw_label(start)
        self._repeat(start, self._draw_marked_outlines(behind))
        self._share(behind)

    def _draw_outlines(self, node: int, end: Callable[[int], None]) -> None:
        """Outlines from a node on, with `<sep>` between; `end` adds the arcs that may follow a complete one."""
        complete = self._run(node, 6)
        half = self._node()
        self._add(complete, self._locations, half)
        self._add(half, self._locations, complete)
        again = self._node()
        self._add(complete, [self._mark("<sep>")], again)
        self._add(again, self._locations, self._first_of(node))
        end(complete)

    def _first_of(self, node: int) -> int:
        """The node behind the first location token from a node on."""
        return next(arc.target for arc in self.arcs[node] if arc.ids[0] == self._locations[0])

    def _draw_marked_outlines(self, node: int) -> int:
        """One or more `<poly>…</poly>` from a node on; returns the node behind the last."""
        opened, complete = self._node(), self._node()
        self._add(node, [self._mark("<poly>")], opened)
        self._add(complete, [self._mark("<poly>")], opened)
        self._draw_outlines(opened, lambda place: self._add(place, [self._mark("</poly>")], complete))
        return complete

    def _draw_boxes_or_polygons(self, start: int) -> None:
        """The first label decides whether all have boxes or all have outlines, since the parser reads only one of both."""
        self._end(start)
        boxes, outlines = self._node(), self._node()
        for node in (boxes, outlines):
            self._end(node)
        behind_box, behind_outline, behind = (
            self._draw_label(boxes),
            self._draw_label(outlines),
            self._draw_label(start),
        )
        self._draw_labelled_boxes(boxes, behind_box)
        self._repeat(outlines, self._draw_marked_outlines(behind_outline))
        for either in (behind_box, behind_outline):
            self._repeat(either, behind)
        for each in (behind, behind_box, behind_outline):
            self._share(each)

    def _draw_text(self, start: int) -> None:
        whole = self._draw_any_text(start, self.text.barred if self.grammar.has_region else _ids([]))
        self._end(whole)
        if self.grammar.has_region:
            self._end(self._run(whole, 4, is_box=True))
