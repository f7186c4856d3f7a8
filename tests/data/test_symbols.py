"""The tokenizer of generated tasks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from morex.data.encoding import UNKNOWN
from morex.data.symbols import SymbolTokenizer
from morex.data.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("symbols", "text", "ids", "again"),
    [
        ("01=", "01 1=", [0, 1, 1, 2], "011="),
        (["0", "10", "="], " 10  0 = ", [1, 0, 2], "10 0 ="),
    ],
)
def test_symbols_and_back(symbols: list[str], text: str, ids: list[int], again: str) -> None:
    tokenizer = SymbolTokenizer(symbols)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode([*ids, tokenizer.eos_id or 0]) == again
    assert tokenizer.eos_id == 3 and tokenizer.vocab_size == 4
    assert UNKNOWN in tokenizer.decode([4])


@pytest.mark.parametrize("has_end", [True, False])
def test_saved_and_read(tmp_path: Path, has_end: bool) -> None:
    tokenizer = SymbolTokenizer(["7", "21"], has_end)
    tokenizer.save(tmp_path)
    read = load_tokenizer(tmp_path)
    assert read.fingerprint == tokenizer.fingerprint and read.vocab_size == 2 + has_end
    assert (read.eos_id is None) is not has_end


def test_unknown_and_senseless_symbols_are_refused(refused: Callable[..., str]) -> None:
    refused(lambda: SymbolTokenizer("01").encode("012"), "'2'", "2 symbols", "0 1")
    many = SymbolTokenizer([str(number) for number in range(1000)])
    assert len(refused(lambda: many.encode("x"), "'x'", "0 1 2 ... 997 998 999")) < 200
    for symbols in ([], ["a", "a"], ["a b"], [""]):
        refused(lambda symbols=symbols: SymbolTokenizer(symbols), "symbols tokenizer")
