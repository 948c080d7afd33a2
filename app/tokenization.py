"""Text or token ids -> what a model takes: prompt in front, special tokens around, cut to the model's max length.

A fast tokenizer's truncation and padding settings are shared, mutable state and not safe under threads, so both are
switched off once and ids are cut here. `encode_batch` releases the GIL.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from copy import copy
from itertools import chain
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer

from app.domain import CHARACTERS_PER_TOKEN, InputType, TokenizedText
from app.errors import CheckpointError, ContextLengthExceeded, InvalidRequest, TooManyTokens
from app.json_text import without_lone_surrogates

S = TypeVar("S", bound=Sized)

PIECE_CHARACTERS = 2**17
"""Texts go through the tokenizer this much at a time: it takes up to 600 bytes of memory for a character."""


class TextTokenizer:
    """One model's tokenizer with its prompts and limits. Safe to share between threads."""

    def __init__(
        self, path: Path, *, prompts: Mapping[InputType, str], max_length: int, default_input_type: InputType
    ) -> None:
        """`path`: a `tokenizer.json`. `default_input_type`: of a text that says nothing of its own. Raises
        CheckpointError when the file cannot be read."""
        try:
            raw = path.read_bytes()
            self._tokenizer = Tokenizer.from_buffer(raw)
        except Exception as error:
            raise CheckpointError(f"{path} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._prompts = {kind: prompt for kind, prompt in prompts.items() if prompt}
        self._max_length = max_length
        self._default_input_type = default_input_type
        self.revision = hashlib.sha256(raw).hexdigest()
        self.vocab_size = self._tokenizer.get_vocab_size()
        frame = self._tokenizer.encode("").ids
        if len(frame) != 2:
            raise CheckpointError(f"{path} puts {len(frame)} special tokens around a text; 2 are expected")
        self._first, self._last = frame

    def limited_to(self, max_length: int) -> "TextTokenizer":
        """The same tokenizer with another max length."""
        other = copy(self)
        other._max_length = max_length
        return other

    def id_of(self, text: str) -> int:
        """The id of the first token of `text`, without special tokens."""
        return int(self._tokenizer.encode(text, add_special_tokens=False).ids[0])

    def tokens(self, input_ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.id_to_token(i) or "" for i in input_ids]

    def texts(
        self, texts: Sequence[str], input_type: InputType | None, *, truncate: bool, first: int = 0
    ) -> list[TokenizedText]:
        """`input_type` None: a prompt already in a text is kept, else the default's goes in front.

        `first`: how many texts came before these, as an error counts them. Raises ContextLengthExceeded for a text
        over the max length, unless `truncate`.
        """
        pieces = self.texts_in_pieces(texts, input_type, truncate=truncate, first=first)
        return list(chain.from_iterable(pieces))

    def texts_in_pieces(
        self, texts: Sequence[str], input_type: InputType | None, *, truncate: bool, first: int = 0
    ) -> Iterator[list[TokenizedText]]:
        """As `texts`, each piece when it is asked for."""
        limit = self._max_length * CHARACTERS_PER_TOKEN
        too_long = next((i for i, text in enumerate(texts) if len(text) > limit), None)
        if too_long is not None and not truncate:
            raise self._exceeded(f"sent {len(texts[too_long])} characters", first + too_long)
        start = 0
        for piece in self._encoded([text[:limit] for text in texts], input_type):
            yield [
                self._fit(ids, kind, truncate, first + i, more=len(texts[i]) > limit)
                for i, (kind, ids) in enumerate(piece, start)
            ]
            start += len(piece)

    def uncut(self, texts: Sequence[str], input_type: InputType | None) -> list[list[int]]:
        """The ids `texts` would give if there were no max length."""
        return [ids for piece in self._encoded(texts, input_type) for _, ids in piece]

    def ids_in_pieces(
        self, inputs: Sequence[Sequence[int]], input_type: InputType | None, *, truncate: bool
    ) -> Iterator[list[TokenizedText]]:
        """Ids of this tokenizer, each piece when it is asked for. A list in special tokens is taken as it is; else
        prompt and special tokens are added.

        Raises InvalidRequest for an id outside the vocabulary, ContextLengthExceeded as `texts`.
        """
        kind = input_type or self._default_input_type
        prompt = self._tokenizer.encode(self._prompts.get(kind, ""), add_special_tokens=False).ids
        start = 0
        for piece in _pieces(inputs):
            yield [self._fit(self._framed(ids, prompt, i), kind, truncate, i) for i, ids in enumerate(piece, start)]
            start += len(piece)

    def _framed(self, given: Sequence[int], prompt: Sequence[int], index: int) -> list[int]:
        outside = next((t for t in given if not 0 <= t < self.vocab_size), None)
        if outside is not None:
            raise InvalidRequest(
                f"Invalid 'input[{index}]': token id {outside} is not in this model's vocabulary of {self.vocab_size}.",
                param="input",
            )
        framed = len(given) > 1 and given[0] == self._first and given[-1] == self._last
        return list(given) if framed else [self._first, *prompt, *given, self._last]

    def _encoded(
        self, texts: Sequence[str], input_type: InputType | None
    ) -> Iterator[list[tuple[InputType, list[int]]]]:
        for piece in _pieces(texts):
            clean = [without_lone_surrogates(text) for text in piece]
            kinds = [input_type or self._type_in(text) for text in clean]
            prompted = [self._prompted(text, kind) for text, kind in zip(clean, kinds, strict=True)]
            encoded = self._tokenizer.encode_batch(prompted)
            yield [(kind, encoding.ids) for kind, encoding in zip(kinds, encoded, strict=True)]

    def _type_in(self, text: str) -> InputType:
        """Of the prompt that the text begins with, or the default."""
        found = (kind for kind, prompt in self._prompts.items() if text.startswith(prompt))
        return next(found, self._default_input_type)

    def _prompted(self, text: str, kind: InputType) -> str:
        prompt = self._prompts.get(kind, "")
        return text if text.startswith(prompt) else prompt + text

    def _fit(
        self, ids: Sequence[int], kind: InputType, truncate: bool, index: int, *, more: bool = False
    ) -> TokenizedText:
        """`more`: the text was longer than what was read of it."""
        if len(ids) <= self._max_length:
            return TokenizedText(tuple(ids), kind, truncated=more)
        if not truncate:
            raise self._exceeded(f"requested {len(ids)} tokens", index, "; prompt and special tokens counted")
        return TokenizedText((*ids[: self._max_length - 1], ids[-1]), kind, truncated=True)

    def _exceeded(self, what: str, index: int, how: str = "") -> ContextLengthExceeded:
        # OpenAI's words to the letter: Elasticsearch knows by the second sentence that it should send less.
        return ContextLengthExceeded(
            f"This model's maximum context length is {self._max_length} tokens, however you {what} (in input[{index}]"
            f"{how}). Please reduce your prompt; or completion length. Or send truncate = end to have it cut.",
            param="input",
            index=index,
        )


def within(most: float, pieces: Iterator[list[TokenizedText]]) -> Iterator[list[TokenizedText]]:
    """The pieces, while they hold at most `most` tokens together. Raises TooManyTokens at the first one beyond."""
    tokens = 0
    for piece in pieces:
        tokens += sum(len(text.input_ids) for text in piece)
        if tokens > most:
            raise TooManyTokens(
                f"Invalid 'input': at least {tokens} tokens requested, at most {most} fit in one request. Send fewer "
                f"texts at a time.",
                param="input",
            )
        yield piece


def _pieces(texts: Sequence[S]) -> Iterator[Sequence[S]]:
    """Runs of texts, or lists of ids, of PIECE_CHARACTERS together, or single ones that are longer."""
    start, size = 0, 0
    for end, text in enumerate(texts):
        if end > start and size + len(text) > PIECE_CHARACTERS:
            yield texts[start:end]
            start, size = end, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]
