"""The split: no text on two sides, the same for everyone, and nothing lost on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from morex.data.corpus import Corpus, FileCorpus, SeparateCorpora
from morex.data.split import Piece, pieces, stretches, survey

Refused = Callable[..., str]
DOCUMENTS = st.lists(st.text("abc de\né", min_size=1, max_size=12), min_size=1, max_size=30)


def corpus_of(folder: Path, texts: list[str]) -> Corpus:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return FileCorpus("test", (path,))


def by_side(stream: list[Piece]) -> dict[str, list[str]]:
    """Documents, or parts of them, put together again."""
    sides: dict[str, list[str]] = {"train": [], "val": []}
    for piece in stream:
        if piece.first:
            sides[piece.side].append("")
        sides[piece.side][-1] += piece.text
    return sides


@given(DOCUMENTS, st.floats(0.01, 0.99), st.integers(-5, 5), st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_no_text_is_on_two_sides_and_none_is_lost(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], val_fraction: float, seed: int, size: int
) -> None:
    assume(len(set(texts)) > 1)
    corpus = corpus_of(tmp_path_factory.mktemp("split"), texts)
    split = survey(corpus, val_fraction, seed)
    sides = by_side(list(pieces(corpus, split, size)))
    assert split.by == "document"
    assert sides["train"] and sides["val"]
    assert not set(sides["train"]) & set(sides["val"])
    assert sorted(sides["train"] + sides["val"]) == sorted(texts)
    assert [text for text in texts if text in set(sides["train"])] == sides["train"]


@given(st.text("abc de\né", min_size=2, max_size=40), st.integers(1, 4), st.floats(0.01, 0.99), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_one_text_is_cut_by_position(
    tmp_path_factory: pytest.TempPathFactory, text: str, copies: int, val_fraction: float, size: int
) -> None:
    corpus = corpus_of(tmp_path_factory.mktemp("split"), [text] * copies)
    split = survey(corpus, val_fraction, 0)
    sides = by_side(list(pieces(corpus, split, size)))
    whole = text * copies
    cut = min(max(int((1 - val_fraction) * len(whole)), 1), len(whole) - 1)
    assert split.by == "position" and split.cut == cut
    assert "".join(sides["train"]) == whole[:cut]
    assert "".join(sides["val"]) == whole[cut:]


def test_the_cut_is_that_of_the_classic_recipe(tmp_path: Path) -> None:
    text = "0123456789" * 111_539 + "0123"
    corpus = corpus_of(tmp_path, [text])
    assert survey(corpus, 0.1, 0).cut == 1_003_854 == int(0.9 * 1_115_394)


def test_a_document_stays_on_its_side_when_others_come(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(400)]
    few = by_side(list(pieces(corpus := corpus_of(tmp_path, texts[:200]), survey(corpus, 0.2, 3), 100)))
    many = by_side(list(pieces(corpus := corpus_of(tmp_path, texts[::-1]), survey(corpus, 0.2, 3), 100)))
    assert set(few["val"]) == set(many["val"]) & set(texts[:200])
    assert 20 < len(few["val"]) < 60 and 50 < len(many["val"]) < 110


def test_the_seed_changes_the_split_and_nothing_else(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [f"document {i}" for i in range(100)])
    first, again, other = survey(corpus, 0.3, 1), survey(corpus, 0.3, 1), survey(corpus, 0.3, 2)
    assert first == again
    assert first.sides != other.sides
    assert first.content == other.content


def test_content_follows_the_text_and_not_its_files(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / f"{name}.txt").write_text(text)
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    contents = [
        survey(FileCorpus("x", order), 0.5, 0).content for order in ((files[0], files[1]), (files[2], files[1]))
    ]
    assert contents[0] == contents[1]
    assert survey(FileCorpus("x", (files[1], files[0])), 0.5, 0).content != contents[0]
    joined = corpus_of(tmp_path, ["onetwo"])
    assert survey(joined, 0.5, 0).content != contents[0]


def test_where_chance_leaves_a_side_empty_the_nearest_size_is_held_out(tmp_path: Path) -> None:
    texts = ["long " * 100, "short", "middle " * 10, "short", "long too " * 90]
    split = survey(corpus_of(tmp_path, texts), 0.0001, 0)
    assert list(split.sides) == [0, 1, 0, 1, 0]
    split = survey(corpus_of(tmp_path, texts), 0.9999, 0)
    assert 0 < sum(split.sides) < len(texts)


def test_counts(tmp_path: Path) -> None:
    split = survey(corpus_of(tmp_path, ["né", "ab", "\U0001f989"]), 0.5, 0)
    assert (split.documents, split.characters, split.num_bytes) == (3, 5, 9)


def test_no_text_at_all_is_refused(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": ""}\n\n')
    refused(lambda: survey(FileCorpus("test", (path,)), 0.1, 0), "data.corpus 'test'", "empty")


@pytest.mark.parametrize("later", [["one", "two"], ["one", "two", "three", "four"], ["one", "two", "threee"]])
def test_a_corpus_that_changes_between_readings_is_refused(tmp_path: Path, refused: Refused, later: list[str]) -> None:
    corpus = corpus_of(tmp_path, ["one", "two", "three"])
    split = survey(corpus, 0.5, 0)
    corpus_of(tmp_path, later)
    refused(lambda: list(pieces(corpus, split, 10)), "changed while it was read")


def test_marks_say_where_documents_start_and_end(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, ["abcdef", "gh"])
    marks = [(piece.text, piece.first, piece.last) for piece in pieces(corpus, survey(corpus, 0.5, 0), 3)]
    assert marks == [("abc", True, False), ("def", False, True), ("gh", True, True)]
    corpus = corpus_of(tmp_path, ["abcdef"])
    marks = [(piece.text, piece.first, piece.last) for piece in pieces(corpus, survey(corpus, 0.5, 0), 2)]
    assert marks == [("ab", True, False), ("c", False, False), ("de", True, False), ("f", False, False)]


@given(st.lists(st.text("ab  \n,é", min_size=1)), st.integers(1, 9))
def test_stretches_lose_nothing_and_are_never_too_long(texts: list[str], size: int) -> None:
    found = list(stretches(texts, size))
    assert "".join(found) == "".join(texts)
    assert all(0 < len(text) <= size for text in found)


def test_stretches_end_where_a_word_begins() -> None:
    text = "some words, and more words to come"
    assert list(stretches([text], 12)) == ["some words,", " and more", " words to", " come"]
    assert list(stretches([text[:9], text[9:]], 12)) == ["some words,", " and more", " words to", " come"]
    assert list(stretches(["one   two   three"], 6)) == ["one", "   two", "   thr", "ee"]
    assert list(stretches(["没有空格的文字"], 3)) == ["没有空", "格的文", "字"]


@given(DOCUMENTS, DOCUMENTS, st.integers(1, 7))
@settings(max_examples=80, deadline=None)
def test_a_corpus_of_its_own_is_held_out_whole(
    tmp_path_factory: pytest.TempPathFactory, train: list[str], val: list[str], size: int
) -> None:
    corpora = SeparateCorpora(
        corpus_of(tmp_path_factory.mktemp("train"), train), corpus_of(tmp_path_factory.mktemp("val"), val)
    )
    split = survey(corpora, 0.5, 0)
    sides = by_side(list(pieces(corpora, split, size)))
    assert split.by == "corpus" and split.documents == len(train) + len(val)
    assert sides == {"val": val, "train": [text for text in train if text not in set(val)]}


def test_content_tells_what_is_held_out(tmp_path: Path) -> None:
    corpora = []
    for name, texts in (("a", ["one", "two"]), ("b", ["three"]), ("all", ["three", "one", "two"])):
        (tmp_path / name).mkdir()
        corpora.append(corpus_of(tmp_path / name, texts))
    one, other, both = corpora
    held_out = [survey(SeparateCorpora(*pair), 0.5, 0).content for pair in ((one, other), (other, one))]
    assert len({*held_out, survey(both, 0.5, 0).content}) == 3


def test_an_empty_corpus_that_is_held_out_is_named(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    empty = FileCorpus("empty", (tmp_path / "empty.jsonl",), option="data.val_corpus")
    refused(
        lambda: survey(SeparateCorpora(corpus_of(tmp_path, ["a"]), empty), 0.1, 0), "data.val_corpus 'empty'", "empty"
    )
