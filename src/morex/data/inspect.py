"""What a corpus holds, as plain data for a table."""

from itertools import islice
from typing import Any

from morex.data.prepare import prepare
from morex.data.sources import open_corpus
from morex.data.stream import TokenStream
from morex.sections.data import DataConfig

SAMPLE_CHARACTERS = 200


def describe(data: DataConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """Documents, bytes and tokens of both sides of the split, the tokenizer, and how the text begins.

    Returns:
        corpus, split (`document`, `position` or `corpus`), documents, left_out (documents that are on neither side,
        because they are held out as well), bytes, tokens, bytes_per_token, tokenizer {kind, vocab_size, eos_id}, train
        and val {documents, bytes, tokens, bytes_per_token, windows, share}, sample (the first 200 characters), folder
        (of the token files). `share` is that of the bytes; `windows` are of `seq_len` tokens.

    Raises:
        DataError: as `prepare`.
    """
    prepared = prepare(data, vocab_size, seq_len)
    sides = {"train": prepared.train, "val": prepared.val}
    num_bytes = sum(stream.num_bytes for stream in sides.values())
    num_tokens = sum(stream.num_tokens for stream in sides.values())
    on_a_side = sum(stream.num_documents for stream in sides.values())
    document = next(open_corpus(data.corpus, data.column).documents())
    return {
        "corpus": data.corpus,
        "split": prepared.split,
        "documents": prepared.documents,
        "left_out": 0 if prepared.split == "position" else prepared.documents - on_a_side,
        "bytes": num_bytes,
        "tokens": num_tokens,
        "bytes_per_token": num_bytes / num_tokens,
        "tokenizer": {
            "kind": prepared.tokenizer.kind,
            "vocab_size": prepared.tokenizer.vocab_size,
            "eos_id": prepared.tokenizer.eos_id,
        },
        **{name: _side(stream, seq_len, num_bytes) for name, stream in sides.items()},
        "sample": "".join(islice(next(document), SAMPLE_CHARACTERS)),
        "folder": str(prepared.folder),
    }


def _side(stream: TokenStream, seq_len: int, all_bytes: int) -> dict[str, Any]:
    return {
        "documents": stream.num_documents,
        "bytes": stream.num_bytes,
        "tokens": stream.num_tokens,
        "bytes_per_token": stream.num_bytes / stream.num_tokens,
        "windows": (stream.num_tokens - 1) // seq_len,
        "share": stream.num_bytes / all_bytes,
    }
