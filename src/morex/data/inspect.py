"""What a corpus or a task holds, as plain data for a table."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from morex.config import Config
from morex.data.corpora import folder_of_shards, open_corpus
from morex.data.encoding import Tokenizer
from morex.data.prepare import PreparedData, prepare
from morex.data.source import prepare_source
from morex.data.stream import TokenStream
from morex.data.tasks.example import Example
from morex.data.tasks.prepared import PreparedTask
from morex.sections.data import DataConfig

SAMPLE_CHARACTERS = 200
SHOWN_EXAMPLES = 8
COUNTED_EXAMPLES = 2000
MOST_ANSWERS = 10
"""Different answers, up to which the share of each is told."""


def describe(data: DataConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """Documents, bytes and tokens of both sides of the split, the tokenizer, and how the text begins.

    Returns:
        corpus, split (`document`, `position`, `corpus` or `member`), documents, left_out (documents that are on neither
        side, because they are held out as well), bytes, tokens, bytes_per_token, tokenizer {kind, vocab_size, eos_id},
        train and val {documents, bytes, tokens, bytes_per_token, windows, share}, sample (the first 200 characters),
        folder (of the token shards, None for a mixture), mixture [{corpus, weight, share, documents, tokens}]. `share`
        is that of the bytes, of a member of a mixture that of the training windows; its documents and tokens are those
        of its training side; `windows` are of `seq_len` tokens.

    Raises:
        DataError: as `prepare`.
    """
    prepared = prepare(data, vocab_size, seq_len)
    sides = {"train": prepared.train, "val": prepared.val}
    num_bytes = sum(stream.num_bytes for stream in sides.values())
    num_tokens = sum(stream.num_tokens for stream in sides.values())
    on_a_side = sum(stream.num_documents for stream in sides.values())
    weights = sum(member.config.weight for member in prepared.members)
    return {
        "corpus": data.corpus if not data.mixture else "mixture",
        "split": prepared.split,
        "documents": prepared.documents,
        "left_out": prepared.documents - on_a_side if prepared.split in ("document", "corpus") else 0,
        "bytes": num_bytes,
        "tokens": num_tokens,
        "bytes_per_token": num_bytes / num_tokens,
        "tokenizer": _tokenizer(prepared.tokenizer),
        **{name: _side(stream, seq_len, num_bytes) for name, stream in sides.items()},
        "sample": _sample(data, prepared),
        "folder": None if prepared.folder is None else str(prepared.folder),
        "mixture": [
            {
                "corpus": member.config.corpus,
                "weight": member.config.weight,
                "share": member.config.weight / weights,
                "documents": member.data.train.num_documents,
                "tokens": member.data.train.num_tokens,
            }
            for member in prepared.members
        ],
    }


def _sample(data: DataConfig, prepared: PreparedData) -> str:
    """How the text begins; where there are shards in place of text, their training side."""
    if data.mixture or folder_of_shards(data.corpus) is not None:
        return prepared.tokenizer.decode(np.asarray(prepared.train.tokens[:SAMPLE_CHARACTERS]))[:SAMPLE_CHARACTERS]
    document = next(open_corpus(data.corpus, data.column).documents())
    return "".join(islice(next(document), SAMPLE_CHARACTERS))


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}


def _side(stream: TokenStream, seq_len: int, all_bytes: int) -> dict[str, Any]:
    return {
        "documents": stream.num_documents,
        "bytes": stream.num_bytes,
        "tokens": stream.num_tokens,
        "bytes_per_token": stream.num_bytes / stream.num_tokens,
        "windows": (stream.num_tokens - 1) // seq_len,
        "share": stream.num_bytes / all_bytes,
    }


def describe_task(config: Config) -> dict[str, Any]:
    """What the task of a config looks like, from its first training examples and its held-out ones.

    Returns:
        task, tokenizer {kind, vocab_size, eos_id}, train and val {examples (None without end), easiest, hardest,
        mean_tokens, most_tokens}, answers (share of each in training where there are few, else empty), shortened
        (examples that lost their beginning to fit a sequence), examples [{difficulty, question, answer}].

    Raises:
        DataError: as `prepare_source`.
    """
    assert config.data.task is not None
    task = prepare_source(config)
    assert isinstance(task, PreparedTask)
    training = task.training(config.train.seed).take(0, COUNTED_EXAMPLES if task.num_train is None else task.num_train)
    decode = task.tokenizer.decode
    answers = Counter(decode(example.answer) for example in training)
    return {
        "task": config.data.task.kind,
        "tokenizer": _tokenizer(task.tokenizer),
        "train": _examples(training, task.num_train),
        "val": _examples(task.val.examples, len(task.val.examples)),
        "answers": {answer: count / len(training) for answer, count in sorted(answers.items())}
        if len(answers) <= MOST_ANSWERS
        else {},
        "shortened": task.shortened,
        "examples": [
            {"difficulty": one.difficulty, "question": decode(one.prompt), "answer": decode(one.answer)}
            for one in training[:SHOWN_EXAMPLES]
        ],
    }


def _examples(examples: Sequence[Example], count: int | None) -> dict[str, Any]:
    sizes = [example.num_read for example in examples]
    difficulties = [example.difficulty for example in examples]
    return {
        "examples": count,
        "easiest": min(difficulties),
        "hardest": max(difficulties),
        "mean_tokens": sum(sizes) / len(sizes),
        "most_tokens": max(sizes),
    }
