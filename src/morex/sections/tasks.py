"""Tasks: examples with a question, an answer and a known difficulty.

A generated task says here how many token ids it needs and how long its examples get, so that what does not fit is
refused before anything is made.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from morex.sections.base import Section

DIGITS = tuple("0123456789")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
RUN = 10
"""Tokens of the run that `copy` and `pattern` hide in a sequence."""

Range = tuple[PositiveInt, PositiveInt]


class GeneratedTaskConfig(Section):
    """What generated tasks share. A question is followed by `=`, the answer and the end of the text."""

    difficulty: Range = (1, 20)
    """Least and greatest difficulty of training examples, drawn evenly."""
    eval_difficulty: Range | None = None
    """Least and greatest difficulty of held-out examples; default: those of training."""
    held_out: PositiveInt = 1000
    """Held-out examples."""

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbols of questions and answers; the first ones are the classes, where the task has any."""
        raise NotImplementedError

    @property
    def classes(self) -> int | None:
        """Classes of a classifier head, or None where answers are longer than one symbol."""
        raise NotImplementedError

    @property
    def least(self) -> int:
        """The least difficulty that there is."""
        return 1

    @property
    def is_cued(self) -> bool:
        """Whether a language model is asked after `=`, and ends its answer; else right after the question."""
        return True

    def longest(self, difficulty: int) -> tuple[int, int]:
        """Most symbols of a question, and of an answer."""
        raise NotImplementedError

    def shrunk(self, vocab_size: int) -> Self:
        """The same task for a model of so few token ids, where it can do with them."""
        return self

    def options(self) -> dict[str, Any]:
        """Constructor options of the task."""
        return self.model_dump(exclude={"kind", *GeneratedTaskConfig.model_fields})

    def vocab_size(self, classifies: bool) -> int:
        """Token ids: the symbols, and for a language model `=` and the end of the text."""
        return len(self.symbols) + (0 if classifies else 2)

    def check_fit(self, vocab_size: int, seq_len: int, max_seq_len: int, head_classes: int | None) -> None:
        """Raises ValueError where a model or its training has no room for the examples.

        Args:
            vocab_size, seq_len, max_seq_len: of the model and its training.
            head_classes: classes of a classifier head; None for a language model.
        """
        classifies = head_classes is not None
        if head_classes is not None and (self.classes is None or self.classes > head_classes):
            have = "answers longer than a class" if self.classes is None else f"{self.classes} classes"
            use = "model.head.kind 'lm'" if self.classes is None else f"model.head.classes {self.classes} or more"
            raise ValueError(f"data.task has {have}, and the classifier has {head_classes} classes; use {use}")
        ids = self.vocab_size(classifies)
        if ids > vocab_size:
            raise ValueError(
                f"data.task has {ids} token ids but model.vocab_size is {vocab_size}; set model.vocab_size to {ids} or "
                "more"
            )
        held_out = self.eval_difficulty or self.difficulty
        sides = (
            ("difficulty", self.difficulty, "train.seq_len", seq_len),
            ("eval_difficulty", held_out, "model.max_seq_len", max_seq_len),
        )
        for name, (_, hardest), option, room in sides:
            question, answer = self.longest(hardest)
            # A language model reads `=` as well; its last token it predicts and never reads.
            needed = question if classifies else question + answer + (1 if self.is_cued else -1)
            if needed > room:
                raise ValueError(
                    f"data.task.{name} up to {hardest} has examples of {needed} tokens, more than {option} {room}; set "
                    f"{option} to {needed} or more, or lower data.task.{name}"
                )

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> Self:
        for name in ("difficulty", "eval_difficulty"):
            span = getattr(self, name)
            if span is not None and span[0] > span[1]:
                raise ValueError(f"{name} {list(span)} is empty; give the least first, such as {sorted(span)}")
            if span is not None and span[0] < self.least:
                raise ValueError(f"{name} {list(span)} begins below {self.least}, the least that this task has")
        return self


class SequenceTaskConfig(GeneratedTaskConfig):
    """What `copy`, `counting` and `pattern` share: random sequences of numbers, each in one of four classes."""

    difficulty: Range = (64, 64)
    """Least and greatest length T of training sequences, drawn evenly."""
    numbers: PositiveInt = 1000
    """The sequences are drawn from 1 .. numbers - 1."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.numbers)))

    @property
    def classes(self) -> int | None:
        return 4

    def longest(self, difficulty: int) -> tuple[int, int]:
        return difficulty, 1

    def shrunk(self, vocab_size: int) -> Self:
        # Two ids are left for `=` and the end of the text.
        return self.model_copy(update={"numbers": max(self.fewest_numbers, min(self.numbers, vocab_size - 2))})

    @property
    def fewest_numbers(self) -> int:
        """The least `numbers` that the task can do with."""
        return 4

    @model_validator(mode="after")
    def _has_numbers(self) -> Self:
        if self.numbers < self.fewest_numbers:
            raise ValueError(f"numbers {self.numbers} are too few for this task; use {self.fewest_numbers} or more")
        return self


class CopyConfig(SequenceTaskConfig):
    """A run of small numbers at a random place: class = its sum modulo 4."""

    kind: Literal["copy"]

    @property
    def least(self) -> int:
        return RUN + 1


class CountingConfig(SequenceTaskConfig):
    """Class = how often a number occurs, 3 standing for three times or more."""

    kind: Literal["counting"]
    target: PositiveInt = 42
    """The number that is counted."""
    balanced: bool = False
    """Draw the four classes equally often; else nearly every sequence is of class 0."""

    @property
    def least(self) -> int:
        return 6 if self.balanced else 1

    @property
    def fewest_numbers(self) -> int:
        return max(4, self.target + 1)


class PatternConfig(SequenceTaskConfig):
    """One of four runs at a random place: 1 to 10, 10 to 1, 1 and 2 in turns, all 5. Class = which."""

    kind: Literal["pattern"]

    @property
    def least(self) -> int:
        return RUN + 1

    @property
    def fewest_numbers(self) -> int:
        return RUN + 1


class ParityConfig(GeneratedTaskConfig):
    """Whether a sequence of bits has an odd number of ones."""

    kind: Literal["parity"]
    difficulty: Range = (1, 20)
    """Least and greatest number of bits in training, drawn evenly."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return DIGITS[:2]

    @property
    def classes(self) -> int | None:
        return 2

    def longest(self, difficulty: int) -> tuple[int, int]:
        return difficulty, 1


class AdditionConfig(GeneratedTaskConfig):
    """The sum of two numbers of n digits each."""

    kind: Literal["addition"]
    difficulty: Range = (1, 10)
    """Least and greatest number of digits n in training, drawn evenly."""
    order: Literal["plain", "reversed_sum", "reversed"] = "plain"
    """Digits as people write them; the sum with its last digit first; or all three numbers so."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return (*DIGITS, "+")

    @property
    def classes(self) -> int | None:
        return None

    def longest(self, difficulty: int) -> tuple[int, int]:
        return 2 * difficulty + 1, difficulty + 1


class PHopConfig(GeneratedTaskConfig):
    """Induction heads in a row: from the last letter p times to what followed its latest earlier occurrence."""

    kind: Literal["p_hop"]
    difficulty: Range = (1, 8)
    """Least and greatest number of hops p in training, drawn evenly."""
    length: PositiveInt = 64
    """Letters of the sequence."""
    letters: Annotated[int, Field(ge=3, le=26)] = 4
    """Letters that there are."""
    count: Literal["decimal", "unary"] = "decimal"
    """How the number of hops is written: in digits, of which some may never occur in training, or as so many ones."""
    places: Literal["last", "all"] = "last"
    """Where the letter is asked for: after `=`, from the last place; or at the place itself, in training at each from
    which p hops exist, in evaluation at the last."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return (*LETTERS[: self.letters], *DIGITS, ":")

    @property
    def classes(self) -> int | None:
        return self.letters

    def longest(self, difficulty: int) -> tuple[int, int]:
        count = difficulty if self.count == "unary" else len(str(difficulty))
        return count + 1 + self.length, 1

    @property
    def is_cued(self) -> bool:
        return self.places == "last"

    def check_fit(self, vocab_size: int, seq_len: int, max_seq_len: int, head_classes: int | None) -> None:
        super().check_fit(vocab_size, seq_len, max_seq_len, head_classes)
        if self.places == "all" and head_classes is not None:
            raise ValueError(
                "data.task.places 'all' asks for a letter at each place, and a classifier gives a sequence one class; "
                "use places 'last' or model.head.kind 'lm'"
            )

    @model_validator(mode="after")
    def _hops_fit(self) -> Self:
        for span in (self.difficulty, self.eval_difficulty or self.difficulty):
            if span[1] * self.letters > self.length:
                raise ValueError(
                    f"{span[1]} hops over {self.letters} letters do not fit into length {self.length}, as a hop goes "
                    f"back about {self.letters} letters; use length {span[1] * self.letters} or more"
                )
        return self


class ChainConfig(GeneratedTaskConfig):
    """Pointers in random order, followed from a first letter to where they end."""

    kind: Literal["chain"]
    difficulty: Range = (1, 4)
    """Least and greatest number of pointers to follow in training, drawn evenly."""
    pairs: Annotated[int, Field(ge=2, le=13)] = 12
    """Pointers that there are; those that are not followed form chains of their own."""
    queries: PositiveInt = 1
    """First letters that are asked for; the answer has a letter for each."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return (*LETTERS, ",", ":")

    @property
    def classes(self) -> int | None:
        return len(LETTERS) if self.queries == 1 else None

    def longest(self, difficulty: int) -> tuple[int, int]:
        return 3 * self.pairs + self.queries, self.queries

    @model_validator(mode="after")
    def _pointers_fit(self) -> Self:
        for name in ("difficulty", "eval_difficulty"):
            span = getattr(self, name)
            if span is not None and span[1] > self.pairs:
                raise ValueError(f"{name} up to {span[1]} needs as many pairs, and there are {self.pairs}; raise pairs")
        return self


class ArithmeticConfig(GeneratedTaskConfig):
    """The value of an expression in nested brackets, modulo a small number."""

    kind: Literal["arithmetic"]
    difficulty: Range = (1, 6)
    """Least and greatest depth of nesting in training, drawn evenly."""
    modulus: Annotated[int, Field(ge=2, le=10)] = 5
    """Values are 0 .. modulus - 1."""
    side_depth: Annotated[int, Field(ge=0, le=3)] = 1
    """Greatest depth of the shallower operand; 0 makes a chain of operations."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return (*DIGITS[: self.modulus], *"+-*()")

    @property
    def classes(self) -> int | None:
        return self.modulus

    def longest(self, difficulty: int) -> tuple[int, int]:
        return self._longest_expression(difficulty), 1

    def _longest_expression(self, depth: int) -> int:
        if depth == 0:
            return 1
        return 3 + self._longest_expression(depth - 1) + self._longest_expression(min(depth - 1, self.side_depth))


class TextTaskConfig(Section):
    """What tasks in words share: they are read from $MOREX_DATA and go through data.tokenizer."""

    loss: Literal["answer", "all"] = "answer"
    """Tokens that training predicts: those of the answer, or those of the question as well."""

    def options(self) -> dict[str, Any]:
        """Constructor options of the task."""
        return self.model_dump(exclude={"kind", "loss"})


class BabiConfig(TextTaskConfig):
    """bAbI: questions about little stories. Difficulty: sentences that the answer follows from."""

    kind: Literal["babi"]
    tasks: Annotated[tuple[Annotated[int, Field(ge=1, le=20)], ...], Field(min_length=1)] = (1,)
    """Which of the 20 tasks."""
    size: Literal["en", "en-10k"] = "en-10k"
    """1,000 or 10,000 training questions a task."""


class Gsm8kConfig(TextTaskConfig):
    """GSM8K: word problems of grade school mathematics. Difficulty: steps of the written solution."""

    kind: Literal["gsm8k"]
    answer: Literal["final", "steps"] = "final"
    """The number alone, or the steps that lead to it and the number."""


TaskConfig = Annotated[
    CopyConfig
    | CountingConfig
    | PatternConfig
    | ParityConfig
    | AdditionConfig
    | PHopConfig
    | ChainConfig
    | ArithmeticConfig
    | BabiConfig
    | Gsm8kConfig,
    Field(discriminator="kind"),
]
