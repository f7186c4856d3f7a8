"""How fast `morex data prepare` is beside the tokenizer's own batch call on the same documents and as many cores.

MOREX_DATA=... python benchmarks/prepare.py [benchmarks/results/prepare.json]

The corpus `classic_books` with GPT-2's tokenizer from JSON lines: whole books, pages of some two thousand characters,
and each paragraph as a document of its own. The command is timed whole: start of the interpreter, reading twice, split,
encoding, checksums, writing. Of the tokenizer, as the library makes it, its calls alone are timed, on documents in
memory, with a thread for each core, in batches of some megabytes: `encode_batch`, and `encode_batch_fast`, which leaves
offsets out. All take turns, round by round, each in a process of its own; medians. Seconds of the clock and of the
cores: the second also mean something on a machine that others use.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from morex.data.corpora import open_corpus
from morex.study.bench import write_json

ROUNDS = 3
MEGABYTES = int(os.environ.get("PREPARE_MEGABYTES", "128"))
TOKENIZER = Path(os.environ["MOREX_DATA"]) / "tokenizers" / "gpt2"
BATCH_BYTES, PAGE_CHARACTERS = 1 << 23, 2000
TIMED = """
import json, sys, time
from pathlib import Path
from tokenizers import Tokenizer
from morex.data.subword import read_hf
backend = Tokenizer.from_str(read_hf(sys.argv[2])._backend.to_str())
encode = getattr(backend, sys.argv[3])
batches, size = [[]], 0
for line in Path(sys.argv[1]).open(encoding="utf-8"):
    text = json.loads(line)["text"]
    batches[-1].append(text)
    size += len(text)
    if size >= int(sys.argv[4]):
        batches.append([])
        size = 0
start, used = time.perf_counter(), time.process_time()
for batch in batches:
    encode(batch, add_special_tokens=False)
print(time.perf_counter() - start, time.process_time() - used)
"""


def books() -> Iterator[str]:
    """Books, as many as come to `MEGABYTES`."""
    size = 0
    for document in open_corpus("classic_books").documents():
        text = "".join(document)
        size += len(text.encode())
        yield text
        if size >= MEGABYTES * 1_000_000:
            return


def paragraphs() -> Iterator[str]:
    """Their paragraphs."""
    return (part for book in books() for part in book.split("\n\n") if part.strip())


def pages() -> Iterator[str]:
    """Their paragraphs, as many together as come to `PAGE_CHARACTERS`."""
    for book in books():
        page = ""
        for part in book.split("\n\n"):
            page += part + "\n\n"
            if len(page) >= PAGE_CHARACTERS:
                yield page
                page = ""
        if page.strip():
            yield page


def tokenizer_seconds(path: Path, call: str) -> tuple[float, float]:
    """Seconds of the tokenizer's own calls, by the clock and of all cores."""
    words = [sys.executable, "-c", TIMED, str(path), str(TOKENIZER), call, str(BATCH_BYTES)]
    clock, cores = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    return float(clock), float(cores)


def prepare_seconds(path: Path, out: Path) -> tuple[float, float]:
    """Seconds of the command, whole, by the clock and of all cores."""
    words = [sys.executable, "-m", "morex", "data", "prepare", "vanilla", "--out", str(out), "--shard-size", "32"]
    for change in (f"data.corpus={path}", f"data.tokenizer={{kind: hf, path: {TOKENIZER}}}", "model.vocab_size=50257"):
        words += ["--set", change]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, used


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        os.environ["MOREX_CACHE"] = f"{place}/cache"
        for name, texts in (("books", books), ("pages", pages), ("paragraphs", paragraphs)):
            path, size, documents = Path(place) / f"{name}.jsonl", 0, 0
            with path.open("w", encoding="utf-8") as file:
                for text in texts():
                    file.write(json.dumps({"text": text}) + "\n")
                    size += len(text.encode())
                    documents += 1
            rounds = []
            for number in range(ROUNDS):
                taken = {"prepare": prepare_seconds(path, Path(place) / f"{name}-{number}")}
                taken |= {call: tokenizer_seconds(path, call) for call in ("encode_batch", "encode_batch_fast")}
                print(
                    name, {key: tuple(round(value, 2) for value in values) for key, values in taken.items()}, flush=True
                )
                rounds.append(taken)
            median = {key: statistics.median(one[key][0] for one in rounds) for key in rounds[0]}
            ratios = {
                f"{call}_{what}": statistics.median(one[call][kind] / one["prepare"][kind] for one in rounds)
                for call in ("encode_batch", "encode_batch_fast")
                for kind, what in enumerate(("ratio", "core_seconds_ratio"))
            }
            row = {
                "documents_are": name,
                "documents": documents,
                "bytes": size,
                "cores": len(os.sched_getaffinity(0)),
                "prepare_bytes_per_s": size / median["prepare"],
                "encode_batch_bytes_per_s": size / median["encode_batch"],
                "encode_batch_fast_bytes_per_s": size / median["encode_batch_fast"],
                **ratios,
            }
            print(row, flush=True)
            rows.append(row)
    if len(sys.argv) > 1:
        write_json(sys.argv[1], rows, ["env", f"PREPARE_MEGABYTES={MEGABYTES}", "python", *sys.argv])


if __name__ == "__main__":
    main()
