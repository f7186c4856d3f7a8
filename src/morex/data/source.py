"""What a config trains on, a corpus or a task, and batches of either."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from morex.config import Config
from morex.data.encoding import Tokenizer
from morex.data.errors import DataError
from morex.data.loader import Batch, EndlessLoader, Loader, Part, held_out_windows
from morex.data.loader import num_windows as windows_of
from morex.data.mixture import MixtureLoader
from morex.data.prepare import PreparedData, prepare
from morex.data.stream import TokenStream
from morex.data.tasks.example import Example
from morex.data.tasks.loader import TaskLoader
from morex.data.tasks.prepared import HeldOut, PreparedTask, prepare_task

PIECE_TOKENS = 1 << 22
SAMPLE_EXAMPLES = 2048


def prepare_source(config: Config, tokenizer: Tokenizer | None = None) -> PreparedData | PreparedTask:
    """Prepares the corpus or the task of a config; `tokenizer` takes the place of `data.tokenizer`.

    Raises:
        DataError: as `prepare` and `prepare_task`, or for a classifier without a task.
    """
    vocab_size, seq_len = config.model.vocab_size, config.train.seq_len
    classifies = config.model.head.kind == "classifier"
    if config.data.task is not None:
        return prepare_task(config.data, vocab_size, seq_len, tokenizer, classifies)
    if classifies:
        raise DataError(
            f"data.corpus '{config.data.corpus}' has no classes for model.head.kind 'classifier'; choose a task, such "
            "as data.task.kind pattern, or use model.head.kind 'lm'"
        )
    return prepare(config.data, vocab_size, seq_len, tokenizer)


def training_loader(
    source: PreparedData | PreparedTask, config: Config, rank: int = 0, ranks: int = 1
) -> EndlessLoader:
    """Training batches in the order of train.seed, or one rank's part of them.

    Raises:
        DataError: a batch cannot be divided over the ranks and their microbatches, or a mixture would run dry.
    """
    train, masked = config.train, config.data.mask_documents
    part = Part(rank, ranks, train.accumulation)
    if isinstance(source, PreparedTask):
        return TaskLoader(source, train.batch_size, train.seed, part)
    settings = (train.seq_len, train.batch_size, config.data.windows, train.seed, part, masked)
    if not source.members:
        return Loader(source.train, *settings)
    mixture = MixtureLoader(source.members, *settings)
    mixture.refuse_to_run_dry(train.steps)
    return mixture


def held_out_batches(
    held_out: TokenStream | HeldOut, seq_len: int, batch_size: int, documents: bool = True
) -> Iterator[Batch]:
    """The whole held-out set once: windows of `seq_len` tokens, or examples, which have their own lengths.

    `documents`: windows say which document each token belongs to.
    """
    if isinstance(held_out, HeldOut):
        return held_out.batches(batch_size)
    return held_out_windows(held_out, seq_len, batch_size, documents)


def first_part(held_out: TokenStream | HeldOut, num_tokens: int, seq_len: int) -> TokenStream | HeldOut:
    """The first windows, or examples, that have so many tokens in all; the whole set where it is smaller."""
    if isinstance(held_out, HeldOut):
        return held_out.head(num_tokens)
    return held_out.head(-(-num_tokens // seq_len) * seq_len + 1)


def num_windows(held_out: TokenStream | HeldOut, seq_len: int) -> int:
    """Rows of all batches of a held-out set."""
    return len(held_out.examples) if isinstance(held_out, HeldOut) else windows_of(held_out, seq_len)


def halves(held_out: TokenStream | HeldOut, seq_len: int) -> tuple[TokenStream | HeldOut, TokenStream | HeldOut]:
    """The first and the second half of the examples of a task, or of the windows of a stream, two or more.

    The last token of the first half is predicted there and is context in the second, so every token is predicted once.
    """
    middle = num_windows(held_out, seq_len) // 2
    assert middle, "one window or example has no halves"
    if isinstance(held_out, HeldOut):
        first, second = held_out.examples[:middle], held_out.examples[middle:]
        return replace(held_out, examples=first), replace(held_out, examples=second)
    cut = middle * seq_len
    return held_out.part(0, cut + 1), held_out.part(cut, held_out.num_tokens)


def mean_length(source: PreparedData | PreparedTask, config: Config) -> int:
    """Tokens of the sequence that a training token is in, on average: what its attention costs follow from.

    Of a corpus `train.seq_len`, of a task from its first training examples: without padding, each example weighted by
    its tokens.
    """
    if isinstance(source, PreparedData):
        return config.train.seq_len
    lengths = [example.num_read for example in _first_examples(source, config.train.seed)]
    return round(sum(length**2 for length in lengths) / sum(lengths))


def training_tokens(source: PreparedData | PreparedTask) -> Iterator[NDArray[np.integer]]:
    """The tokens of a training set in pieces [N]; of a task without end, those of its first examples."""
    if isinstance(source, PreparedTask):
        for example in _first_examples(source, seed=0):
            yield np.concatenate((example.prompt, example.answer)).astype(np.int64)
        return
    for start in range(0, source.train.num_tokens, PIECE_TOKENS):
        yield np.asarray(source.train.tokens[start : start + PIECE_TOKENS])


def _first_examples(task: PreparedTask, seed: int) -> list[Example]:
    return task.training(seed).take(0, min(task.num_train or SAMPLE_EXAMPLES, SAMPLE_EXAMPLES))


def beginning(held_out: TokenStream | HeldOut, limit: int) -> list[int]:
    """The first tokens of a held-out set, at most `limit`; of a task those of its first question."""
    tokens = held_out.examples[0].prompt if isinstance(held_out, HeldOut) else held_out.tokens
    ids: list[int] = np.asarray(tokens[:limit]).tolist()
    return ids
