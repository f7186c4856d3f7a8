"""`gsm8k`: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems"."""

import gzip
import json
import zlib
from collections.abc import Iterator

from morex.data.errors import DataError
from morex.data.tasks.text import Split, TextExample, TextTask, find

MARK = "####"
"""Stands before the number at the end of a solution."""


class Gsm8k(TextTask):
    """Each question on a line, then the number (`final`), or the written solution as it stands (`steps`).

    Difficulty: the lines of the solution before its number.
    """

    kind = "gsm8k"

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def read(self, split: Split) -> Iterator[TextExample]:
        path = find(self.kind, f"{split}.jsonl", f"{split}.jsonl.gz")
        opened = gzip.open if path.suffix == ".gz" else open
        try:
            with opened(path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    entry = json.loads(line)
                    solution = entry["answer"].strip()
                    steps, _, number = solution.rpartition(MARK)
                    yield TextExample(
                        prompt=entry["question"].strip() + "\n",
                        answer=number.strip() if self.answer == "final" else solution,
                        difficulty=len(steps.strip().splitlines()),
                    )
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"'{path}' cannot be read as GSM8K ({error!r}); put the original there") from None
