"""Trained BPE and tokenizers made elsewhere."""

import builtins
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from morex.data.split import stretches
from morex.data.subword import AT_ONCE, END_OF_TEXT, SubwordTokenizer, read_hf, train_bpe
from morex.data.tokenizer import load_tokenizer

Refused = Callable[..., str]
TEXT = "It's the first day of spring, and the 3 birds don't sing yet; they will, they will! " * 30
TRAINED = train_bpe([TEXT], 400)
TRAIN_AND_PRINT = f"from morex.data.subword import train_bpe; print(train_bpe([{TEXT!r}], 400).fingerprint)"


def test_bpe_learns_up_to_the_size_asked_for() -> None:
    assert TRAINED.kind == "bpe" and 257 < TRAINED.vocab_size <= 400
    assert len(TRAINED.encode(TEXT)) < len(TEXT) / 3
    assert train_bpe([TEXT], 257).encode("day") != TRAINED.encode("day")
    assert len(train_bpe([TEXT], 257).encode("day")) == 3


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_gives_any_text_back(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


@given(
    st.text(
        st.sampled_from("abtheIs' ,.\n\t\r3²é\u0301\u00a0\x1c\x85\u3000") | st.characters(exclude_categories=["Cs"])
    )
)
def test_text_cut_between_a_word_and_a_space_encodes_to_the_same(text: str) -> None:
    whole = TRAINED.encode(text)
    for place in range(1, len(text)):
        if text[place] == " " and not text[place - 1].isspace():
            assert TRAINED.encode(text[:place]) + TRAINED.encode(text[place:]) == whole


def test_long_text_in_stretches_equals_the_whole() -> None:
    found = list(stretches([TEXT], 100))
    assert len(found) > 20
    assert [index for ids in TRAINED.encode_batch(found) for index in ids.tolist()] == TRAINED.encode(TEXT)


def test_a_batch_of_many_texts_is_each_by_itself() -> None:
    words = TEXT.split(" ")
    for count in (0, 1, AT_ONCE, 2 * AT_ONCE + 3):
        texts = [" ".join(words[i % 50 : i % 50 + i % 4]) for i in range(count)]
        batch = TRAINED.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [TRAINED.encode(text) for text in texts]
        assert {ids.dtype.type for ids in batch} <= {TRAINED.dtype}


def test_bpe_training_is_the_same_everywhere() -> None:
    prints = set()
    for threads, hash_seed in (("1", "1"), ("2", "2")):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", TRAIN_AND_PRINT], env=environment, capture_output=True, text=True, check=True
        )
        prints.add(done.stdout.strip())
    assert prints == {TRAINED.fingerprint}


def test_special_tokens_in_text_are_text() -> None:
    text = f"one{END_OF_TEXT}two"
    assert TRAINED.eos_id not in TRAINED.encode(text)
    assert TRAINED.decode(TRAINED.encode(text)) == text
    assert TRAINED.decode([*TRAINED.encode("one"), TRAINED.eos_id or 0, *TRAINED.encode("two")]) == "onetwo"


def test_bpe_too_small_for_the_bytes_is_refused(refused: Refused) -> None:
    refused(lambda: train_bpe([TEXT], 256), "at least 257", "got 256", "model.vocab_size", "char")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with a tokenizer.json that adds special tokens, pads and truncates, as published ones may."""
    TRAINED.save(tmp_path / "trained")
    backend = Backend.from_file(str(tmp_path / "trained" / "tokenizer.json"))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    folder = tmp_path / "published"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_published_tokenizers_encode_text_and_nothing_else(published: Path) -> None:
    text = TEXT[:200]
    for source in (published, published / "tokenizer.json"):
        tokenizer = read_hf(str(source))
        assert tokenizer.kind == "hf" and tokenizer.vocab_size == TRAINED.vocab_size + 2
        assert tokenizer.encode(text) == TRAINED.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_published_tokenizers_are_saved_and_loaded(published: Path, tmp_path: Path) -> None:
    tokenizer = read_hf(str(published))
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert isinstance(loaded, SubwordTokenizer) and loaded.kind == "hf"
    assert (loaded.eos_id, loaded.fingerprint) == (tokenizer.eos_id, tokenizer.fingerprint)
    assert read_hf(str(tmp_path / "saved")).encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (None, END_OF_TEXT),
        ('{"eos_token": "</s>"}', "</s>"),
        ('{"eos_token": {"content": "</s>", "special": true}}', "</s>"),
        ('{"eos_token": null}', END_OF_TEXT),
        ('{"eos_token": "<gone>"}', END_OF_TEXT),
    ],
)
def test_end_of_text_is_what_the_config_names(published: Path, config: str | None, name: str) -> None:
    if config is not None:
        (published / "tokenizer_config.json").write_text(config)
    backend = Backend.from_file(str(published / "tokenizer.json"))
    assert read_hf(str(published)).eos_id == backend.token_to_id(name)


def test_tokenizer_without_end_of_text(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 3, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_hf(str(tmp_path))
    assert tokenizer.eos_id is None
    assert tokenizer.vocab_size == 4, "the largest id counts, not the number of entries"
    assert tokenizer.encode("a b c") == [0, 3, 1]


def test_gpt2_files_are_read(tmp_path: Path) -> None:
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        folder = tmp_path / names[0]
        folder.mkdir()
        TRAINED._backend.model.save(str(folder))
        if names[0] == "encoder.json":
            (folder / "vocab.json").rename(folder / names[0])
            (folder / "merges.txt").rename(folder / names[1])
        tokenizer = read_hf(str(folder))
        assert tokenizer.encode(TEXT) == TRAINED.encode(TEXT)
        assert tokenizer.eos_id == TRAINED.eos_id
        assert tokenizer.decode([*tokenizer.encode("the birds"), tokenizer.eos_id or 0]) == "the birds"


def test_gpt2_itself() -> None:
    folder = Path(os.environ.get("MOREX_DATA", ""), "tokenizers")
    if not folder.is_dir() or not os.environ.get("MOREX_DATA"):
        pytest.skip("MOREX_DATA names no folder with tokenizers")
    gpt2, neox = read_hf(str(folder / "gpt2")), read_hf(str(folder / "gpt_neox_20b" / "tokenizer.json"))
    text = "Hello world, the quick brown fox"
    assert (gpt2.vocab_size, gpt2.eos_id) == (50_257, 50_256)
    assert gpt2.encode(text) == [15496, 995, 11, 262, 2068, 7586, 21831]
    assert neox.encode(text) == [12092, 1533, 13, 253, 3158, 8516, 30013]
    assert gpt2.decode(gpt2.encode(text)) == neox.decode(neox.encode(text)) == text


def test_what_cannot_be_read_is_refused(tmp_path: Path, published: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    refused(lambda: read_hf(str(tmp_path / "empty")), "data.tokenizer.path", "tokenizer.json", "vocab.bpe")
    damaged = tmp_path / "tokenizer.json"
    damaged.write_text('{"model": 1}')
    refused(lambda: read_hf(str(damaged)), "data.tokenizer.path", str(damaged), "cannot be read")
    damaged.write_bytes(b"\xff")
    refused(lambda: read_hf(str(damaged)), "cannot be read")
    (published / "tokenizer_config.json").write_text("nothing")
    refused(lambda: read_hf(str(published)), "tokenizer_config.json")
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "encoder.json").write_text("{}")
    (gpt2 / "vocab.bpe").write_text("a b\n")
    refused(lambda: read_hf(str(gpt2)), "encoder.json", "GPT-2")


def test_hub_names_without_transformers_name_the_extra(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(lambda: read_hf("someone/some-model"), "data.tokenizer.path 'someone/some-model'", "morex[hf]")


def test_hub_names_that_lead_nowhere_are_refused(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers of the extra `hf` is not installed")

    def offline(name: str) -> None:
        raise OSError(f"We could not connect to the hub to load {name}.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    refused(lambda: read_hf("someone/some-model"), "someone/some-model", "could not connect")


def test_hub_names_go_through_transformers(monkeypatch: pytest.MonkeyPatch, published: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers of the extra `hf` is not installed")
    there = tmp_path / "model"
    shutil.copytree(published, there)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(there / "tokenizer.json"), eos_token="</s>")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: fast)
    tokenizer = read_hf("someone/some-model")
    assert tokenizer.encode(TEXT) == TRAINED.encode(TEXT)
    assert tokenizer.eos_id == fast.eos_token_id
