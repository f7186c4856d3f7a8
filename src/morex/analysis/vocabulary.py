"""What kind of token each id of a vocabulary is, by its text and by how often training saw it."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from morex.data.encoding import UNKNOWN, Tokenizer

CLASSES = ("word", "number", "punctuation", "whitespace", "fragment", "special")
RARITIES = ("frequent", "middle", "rare")
FREQUENT, RARE = 0.5, 0.9
"""Shares of the training tokens, most frequent ids first: below the first an id is frequent, beyond the second rare."""


def token_classes(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.uint8]:
    """Place in `CLASSES` of each of the ids 0..V-1 [V].

    A text with a letter is a `word`; without one, but with a digit, a `number`; all blank, `whitespace`; all else is
    `punctuation`. Bytes that are no whole character are a `fragment`, and so are ids that no text belongs to. Ids
    without text, such as the end of a text, are `special`.
    """
    found = [_class_of(tokenizer, i) for i in range(vocab_size)]
    return np.array([CLASSES.index(name) for name in found], np.uint8)


def _class_of(tokenizer: Tokenizer, token: int) -> str:
    text = "" if token == tokenizer.eos_id else tokenizer.decode([token])
    if not text:
        return "special"
    if UNKNOWN in text:
        return "fragment"
    if any(letter.isalpha() for letter in text):
        return "word"
    if any(letter.isnumeric() for letter in text):
        return "number"
    return "whitespace" if text.isspace() else "punctuation"


def token_rarities(training: Iterable[NDArray[np.integer]], vocab_size: int) -> NDArray[np.uint8]:
    """Place in `RARITIES` of each of the ids 0..V-1 [V], by their frequency in pieces of a training set [N] each.

    Ids in falling order of frequency: `frequent` those that begin within the first half of the tokens, `rare` those
    that begin within the last tenth, and those that never occur.
    """
    counts = np.zeros(vocab_size, np.int64)
    for tokens in training:
        counts += np.bincount(tokens, minlength=vocab_size)
    order = np.argsort(-counts, kind="stable")
    before = np.zeros(vocab_size)
    before[order] = (np.cumsum(counts[order]) - counts[order]) / max(1, counts.sum())
    rarity = np.where(before < FREQUENT, 0, np.where(before < RARE, 1, 2))
    return np.where(counts == 0, 2, rarity).astype(np.uint8)
