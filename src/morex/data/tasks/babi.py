"""`babi`: Weston et al. 2015, "Towards AI-Complete Question Answering: A Set of Prerequisite Toy Tasks"."""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence

from morex.data.errors import DataError
from morex.data.tasks.text import Split, TextExample, TextTask, find


class Babi(TextTask):
    """Each question with the sentences of its story so far, earlier questions left out, one a line.

    Difficulty: the number of supporting facts that the set names.
    """

    kind = "babi"

    def __init__(self, tasks: Sequence[int], size: str) -> None:
        self.tasks, self.size = tasks, size

    def read(self, split: Split) -> Iterator[TextExample]:
        path = find(self.kind, f"{self.size}.tar.gz")
        try:
            # Decompressed to its end, so that its checksum is compared.
            content = io.BytesIO(gzip.decompress(path.read_bytes()))
            with tarfile.open(fileobj=content) as archive:
                names = [member.name for member in archive.getmembers() if member.isfile()]
                for task in self.tasks:
                    ending = re.compile(rf"/{self.size}/qa{task}_[^/]*_{split}\.txt$")
                    member = next(filter(ending.search, names), None)
                    if member is None:
                        raise DataError(
                            f"'{path}' has no {split} file of bAbI task {task}; leave it out of data.task.tasks, or "
                            "choose another data.task.size"
                        )
                    file = archive.extractfile(member)
                    assert file is not None
                    yield from stories(file.read().decode("utf-8"))
        except (OSError, EOFError, zlib.error, tarfile.TarError, UnicodeDecodeError, NoQuestionError) as error:
            raise DataError(f"'{path}' cannot be read as a bAbI archive ({error}); put the original there") from None


class NoQuestionError(Exception):
    """A line that is neither a sentence nor a question."""


def stories(text: str) -> Iterator[TextExample]:
    """The questions of a file: lines `ID sentence` and `ID question TAB answer TAB supporting IDs`; ID 1 is a start.

    Raises:
        NoQuestionError: a line has one tab, or more than two.
    """
    story: list[str] = []
    for line in text.splitlines():
        number, _, rest = line.strip().partition(" ")
        if number == "1":
            story = []
        sentence, *answer = rest.split("\t")
        if not answer:
            story.append(sentence.strip())
            continue
        if len(answer) != 2:
            raise NoQuestionError(f"'{line.strip()}' is no sentence and no question with its answer and facts")
        prompt = "\n".join([*story, sentence.strip(), ""])
        yield TextExample(prompt, answer[0].strip(), difficulty=len(answer[1].split()))
