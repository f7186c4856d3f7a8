"""Classes of tokens by text and by frequency."""

import numpy as np

from morex.analysis.vocabulary import CLASSES, RARITIES, token_classes, token_rarities
from morex.data.characters import ByteTokenizer, CharTokenizer


def test_classes_of_characters() -> None:
    tokenizer = CharTokenizer("".join(sorted("aß7½ \n,§€")))
    found = token_classes(tokenizer, tokenizer.vocab_size + 1)
    classes = {letter: CLASSES[found[tokenizer.encode(letter)[0]]] for letter in "aß7½ \n,§€"}
    assert classes == {
        "a": "word",
        "ß": "word",
        "7": "number",
        "½": "number",
        " ": "whitespace",
        "\n": "whitespace",
        ",": "punctuation",
        "§": "punctuation",
        "€": "punctuation",
    }
    assert CLASSES[found[tokenizer.vocab_size]] == "fragment"  # no text belongs to it


def test_classes_of_bytes() -> None:
    tokenizer = ByteTokenizer()
    found = token_classes(tokenizer, tokenizer.vocab_size)
    assert CLASSES[found[ord("x")]] == "word" and CLASSES[found[0xC3]] == "fragment"
    assert tokenizer.eos_id is not None and CLASSES[found[tokenizer.eos_id]] == "special"


def test_a_word_with_a_space_or_digit_is_a_word() -> None:
    class Words:
        eos_id = None
        texts = (" the", "h2o", " 1776", "...", "  ", "")

        def decode(self, ids: list[int]) -> str:
            return self.texts[ids[0]]

    found = token_classes(Words(), 6)  # type: ignore[arg-type]
    assert [CLASSES[i] for i in found] == ["word", "word", "number", "punctuation", "whitespace", "special"]


def test_rarities_by_cumulated_frequency() -> None:
    # 50 of id 2, 30 of id 0, 15 of id 4, 5 of id 1, none of id 3.
    ids = np.repeat([2, 0, 4, 1], [50, 30, 15, 5]).astype(np.uint16)
    found = token_rarities([ids[:40], ids[40:]], 5)
    # Id 0 begins where half is covered, id 4 at 0.8, id 1 at 0.95.
    assert [RARITIES[i] for i in found] == ["middle", "rare", "frequent", "rare", "middle"]


def test_equal_frequencies_go_by_id() -> None:
    ids = np.array([0, 1, 2, 3], np.uint16)
    assert [RARITIES[i] for i in token_rarities([ids], 4)] == ["frequent", "frequent", "middle", "middle"]
