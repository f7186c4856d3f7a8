"""Batches of a task's training examples: the counterpart of `morex.data.loader.Loader`."""

from typing import Any

from morex.data.loader import WHOLE, Batch, EndlessLoader, Part
from morex.data.tasks.example import answer_batch, class_batch
from morex.data.tasks.prepared import PreparedTask


class TaskLoader(EndlessLoader):
    """Draws training examples without end.

    The k-th is a function of the seed and k alone. Examples of one batch are padded on the right to the longest one.
    """

    _draws, _draws_from = "examples", "task"

    def __init__(self, task: PreparedTask, batch_size: int, seed: int = 0, part: Part = WHOLE) -> None:
        """Raises DataError where the batch cannot be divided."""
        self._runs = part.runs(batch_size)
        self._task, self._batch_size, self._seed = task, batch_size, seed
        self._examples = task.training(seed)

    def next_batch(self) -> Batch:
        """The next `batch_size` examples, or this rank's of them."""
        taken = [self._examples.take(self._drawn + run.start, len(run)) for run in self._runs]
        examples = [example for own in taken for example in own]
        self._drawn += self._batch_size
        if self._task.val.classifies:
            return class_batch(examples)
        return answer_batch(examples, self._task.predicts_prompt)

    def _identity(self) -> dict[str, Any]:
        return {"seed": self._seed, "examples": self._task.content}
