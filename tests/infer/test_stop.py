"""The text of a request while it grows, against the whole text decoded at once and cut by the book."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morex.data.characters import ByteTokenizer, CharTokenizer
from morex.data.encoding import Tokenizer
from morex.data.subword import train_bpe
from morex.data.symbols import SymbolTokenizer
from morex.infer.text import GrowingText

LETTERS = "ab é€\U0001f989"
TEXTS = st.text(LETTERS, max_size=60)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)


@cache
def bpe() -> Tokenizer:
    return train_bpe([f"{LETTERS} ab aab éa €\U0001f989 " * 30], 290)


KINDS = {"byte": ByteTokenizer, "char": lambda: CharTokenizer("".join(sorted(LETTERS))), "bpe": bpe}


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; of several that end there, the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def grown(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], stops: list[str]) -> GrowingText:
    """A text that has grown to its end; no piece holds anything that comes otherwise later."""
    growing = GrowingText(tokenizer, prompt, stops)
    pieces = []
    for token in tokens:
        pieces.append(growing.add(token))
        if growing.has_stopped:
            break
    pieces.append(growing.finish())
    assert "".join(pieces) == growing.text
    return growing


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXTS, text=TEXTS, stops=STOPS)
def test_pieces_are_the_text_before_a_stop_string(kind: str, prompt: str, text: str, stops: list[str]) -> None:
    tokenizer = KINDS[kind]()
    growing = grown(tokenizer, tokenizer.encode(prompt), tokenizer.encode(text), stops)
    assert (growing.text, growing.has_stopped) == cut(text, stops)


@given(
    tokens=st.lists(
        st.sampled_from([*range(97, 100), 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF, 256]), max_size=90
    )
)
def test_bytes_that_are_no_text_are_what_they_are_at_once(tokens: list[int]) -> None:
    tokenizer = ByteTokenizer()
    growing = GrowingText(tokenizer, [65])
    pieces = [growing.add(token) for token in tokens]
    assert tokenizer.decode(tokens).startswith("".join(pieces))
    assert "".join(pieces) + growing.finish() == tokenizer.decode(tokens)


@given(data=st.data())
def test_however_a_text_is_split_into_tokens(data: st.DataObject) -> None:
    """Pieces of words as tokens, so that a stop string begins and ends anywhere in one."""
    words = ["a", "b", "ab", "ba", "aab", "bba"]
    tokenizer = SymbolTokenizer([f"{word}." for word in words])
    tokens = data.draw(st.lists(st.integers(0, len(words) - 1), max_size=80))
    stops = data.draw(st.lists(st.text("ab. ", min_size=1, max_size=6), max_size=3))
    whole = tokenizer.decode([0, *tokens])[2:]
    growing = grown(tokenizer, [0], tokens, stops)
    assert (growing.text, growing.has_stopped) == cut(whole, stops)


def test_nothing_that_may_be_a_stop_string_is_handed_out() -> None:
    tokenizer = ByteTokenizer()
    growing = GrowingText(tokenizer, [], ["</end>", "dx"])
    assert [growing.add(byte) for byte in b"a</e</en"] == ["a", "", "", "", "</e", "", "", ""]
    assert [growing.add(byte) for byte in b"dx"] == ["", "</en"]
    assert growing.has_stopped
    assert growing.add(65) == growing.finish() == ""
    assert growing.text == "a</e</en"


def test_half_a_character_waits() -> None:
    growing = GrowingText(ByteTokenizer(), [])
    assert [growing.add(byte) for byte in "é\U0001f989".encode()] == ["", "é", "", "", "", "\U0001f989"]
    assert (growing.add(0xE2), growing.add(0x82), growing.finish()) == ("", "", "\ufffd")


def test_a_half_character_of_the_prompt_is_completed() -> None:
    first, *rest = "€".encode()
    assert grown(ByteTokenizer(), [97, first], rest, []).text == "€"


def test_a_long_text_is_decoded_a_few_tokens_at_a_time() -> None:
    tokenizer, sizes = ByteTokenizer(), []
    decode = tokenizer.decode

    def noted(ids: list[int]) -> str:  # type: ignore[misc]
        sizes.append(len(ids))
        return decode(ids)

    tokenizer.decode = noted  # type: ignore[assignment, method-assign]
    text = "naïve café € \U0001f989 " * 40
    assert grown(tokenizer, [], list(text.encode()), []).text == text
    assert max(sizes) < 48
