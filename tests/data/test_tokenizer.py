"""Byte and char tokenizers, and what every tokenizer does alike."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morex.data.characters import ByteTokenizer, CharTokenizer, characters_of
from morex.data.encoding import Tokenizer
from morex.data.subword import train_bpe
from morex.data.tokenizer import KINDS, load_tokenizer

Refused = Callable[..., str]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SENTENCE = "the quick brown fox jumps over the lazy dog, naïve café \U0001f989 "


def every_kind() -> list[Tokenizer]:
    return [ByteTokenizer(), CharTokenizer("".join(sorted(set(SENTENCE)))), train_bpe([SENTENCE * 20], 300)]


@given(TEXT)
def test_bytes_come_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_tokenizer_has_one_special_token() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.kind) == (257, 256, "byte")
    assert tokenizer.decode([104, 105, 256]) == "hi"
    assert tokenizer.decode([0xC3]) == "\ufffd"


@given(TEXT.filter(bool))
def test_characters_come_back(text: str) -> None:
    tokenizer = CharTokenizer(characters_of([text]))
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert tokenizer.encode(text) == [tokenizer.characters.index(character) for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (len(set(text)), None)


def test_characters_of_several_texts_are_sorted_and_unique() -> None:
    assert characters_of(["ba\n", "", "c\U0001f989a"]) == "\nabc\U0001f989"


@pytest.mark.parametrize(("text", "named"), [("abz", "'z' (U+007A)"), ("aé", "'é' (U+00E9)"), ("\n", r"'\n' (U+000A)")])
def test_unknown_characters_are_named(refused: Refused, text: str, named: str) -> None:
    refused(lambda: CharTokenizer("abcx").encode(text), named, "the 4 of the char tokenizer", "data.tokenizer.kind")


def test_char_tokenizer_wants_each_character_once(refused: Refused) -> None:
    refused(lambda: CharTokenizer(""), "at least one character")
    refused(lambda: CharTokenizer("aba"), "only once")


@pytest.mark.parametrize("tokenizer", every_kind(), ids=lambda tokenizer: tokenizer.kind)
class TestEveryKind:
    def test_text_comes_back(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode(SENTENCE)
        assert tokenizer.decode(ids) == SENTENCE
        assert all(type(index) is int and 0 <= index < tokenizer.vocab_size for index in ids)
        assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""

    def test_decode_takes_arrays_and_tensors(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode(SENTENCE)
        assert tokenizer.decode(np.array(ids)) == tokenizer.decode(torch.tensor(ids)) == SENTENCE

    def test_batches_equal_single_texts(self, tokenizer: Tokenizer) -> None:
        texts = [SENTENCE[i : i + 9] for i in range(0, 40, 3)] + [""]
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]

    def test_ids_beyond_the_vocabulary_decode_to_the_replacement_character(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("the fox")
        assert tokenizer.decode([*ids, tokenizer.vocab_size, 60_000, *ids]) == "the fox\ufffd\ufffdthe fox"

    def test_end_of_text_decodes_to_nothing(self, tokenizer: Tokenizer) -> None:
        if tokenizer.kind == "char":
            assert tokenizer.eos_id is None
        else:
            assert tokenizer.eos_id is not None
            assert tokenizer.decode([*tokenizer.encode("fox"), tokenizer.eos_id]) == "fox"

    def test_saved_and_loaded_it_is_the_same(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        tokenizer.save(tmp_path / "a" / "tokenizer")
        loaded = load_tokenizer(tmp_path / "a" / "tokenizer")
        assert type(loaded) is type(tokenizer) is KINDS[tokenizer.kind] and loaded.kind == tokenizer.kind
        assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        assert loaded.encode(SENTENCE) == tokenizer.encode(SENTENCE)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert all(json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "a" / "tokenizer").iterdir())

    def test_dtype_holds_every_id(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.dtype is np.uint16


def test_fingerprints_differ_where_encodings_do() -> None:
    tokenizers = [*every_kind(), CharTokenizer("ab"), CharTokenizer("ba"), train_bpe(["other text " * 20], 300)]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)


def test_large_vocabularies_take_wider_integers() -> None:
    tokenizer = CharTokenizer("".join(map(chr, [*range(0xD800), *range(0xE000, 0x13000)])))
    assert tokenizer.vocab_size > 1 << 16 and tokenizer.dtype is np.uint32
    last = tokenizer.characters[-1]
    assert tokenizer.encode(last) == [tokenizer.vocab_size - 1]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"kind": "char"}', "damaged"),
        ('{"kind": "bpe", "eos_id": 0, "tokenizer": {}}', "damaged"),
        ('{"kind": "word"}', "unknown kind 'word'"),
    ],
)
def test_damaged_tokenizers_are_refused(tmp_path: Path, refused: Refused, content: str, word: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    refused(lambda: load_tokenizer(tmp_path), str(tmp_path), word)


def test_missing_tokenizer_is_refused(tmp_path: Path, refused: Refused) -> None:
    refused(lambda: load_tokenizer(tmp_path), str(tmp_path), "no tokenizer")
