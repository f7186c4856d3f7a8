"""Batches of a task's training examples: the counterpart of `morex.data.loader.Loader`."""

from typing import Any

from morex.data.errors import DataError
from morex.data.loader import Batch
from morex.data.tasks.example import answer_batch, class_batch
from morex.data.tasks.prepared import PreparedTask


class TaskLoader:
    """Draws training examples without end.

    The k-th is a function of the seed and k alone, so the loader's whole state is k and it resumes exactly, at any
    batch size. Examples of one batch are padded on the right to the longest of them.
    """

    def __init__(self, task: PreparedTask, batch_size: int, seed: int = 0) -> None:
        self._task, self._batch_size, self._seed = task, batch_size, seed
        self._examples = task.training(seed)
        self._drawn = 0

    def next_batch(self) -> Batch:
        """The next `batch_size` examples."""
        examples = self._examples.take(self._drawn, self._batch_size)
        self._drawn += self._batch_size
        if self._task.val.classifies:
            return class_batch(examples)
        return answer_batch(examples, self._task.predicts_prompt)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly; plain JSON data."""
        return {"drawn": self._drawn, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another loader of the same examples stood; raises DataError where it is not the same."""
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise DataError(
                    f"the saved place in the examples has {name} {state.get(name)!r} but this run has {mine!r}; go on "
                    "with the task and the settings of the run that was saved"
                )
        self._drawn = int(state["drawn"])

    def _identity(self) -> dict[str, Any]:
        return {"seed": self._seed, "examples": self._task.content}
