"""What a study leaves behind, as typed records: one `Cell` per training, one `Row` per variant, `Results` for all.

A cell's numbers come from its run folder: `summary.json`, `metrics.jsonl`, and `cell.json`, which `cell` writes after
the training. Losses are in nats per token, times in seconds, memory in bytes.
"""

from typing import Any, Literal

from pydantic import Field

from morex.sections.base import Section
from morex.study.spec import StudyConfig, Twin

Kind = Literal["dense", "recursive", "routed", "experts"]


class Evaluation(Section):
    """One evaluation of the whole held-out set during training."""

    step: int
    tokens: int
    seconds: float
    flops: float
    val_loss: float
    val_loss_oracle: float | None = None


class TrainingPoint(Section):
    """One logged training step."""

    step: int
    tokens: int
    seconds: float
    flops: float
    loss: float


class DepthMap(Section):
    """The recursions that each token of a short text took."""

    tokens: tuple[str, ...]
    depths: tuple[int, ...]


class Routing(Section):
    """Where tokens of the held-out text went, under the rule that decoding uses."""

    tokens: int
    """Tokens that were counted."""
    deepest: int
    """Recursions of a token that takes all of them, over all routed groups."""
    histogram: tuple[int, ...] | None = None
    """Tokens that took 0, 1, ... recursions; absent where no router decides depth."""
    depth_map: DepthMap | None = None
    expert_load: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Share of the assignments that each expert got, by layer; sums to 1."""

    @property
    def mean_depth(self) -> float | None:
        if self.histogram is None:
            return None
        return sum(depth * count for depth, count in enumerate(self.histogram)) / max(1, sum(self.histogram))


class Sample(Section):
    """A prompt and what the trained model made of it."""

    prompt: str
    text: str


class Measures(Section):
    """What `cell` measures after the training."""

    val_loss_first_half: float | None = None
    val_loss_second_half: float | None = None
    decode_tokens_per_s: float | None = None
    sample: Sample | None = None
    routing: Routing | None = None
    refusal: str | None = None
    """Why the model could not be decoded, where it could not."""


class Summary(Section):
    """What the table needs of a run's summary.json."""

    steps: int
    tokens: int
    seconds: float
    train_flops: float
    final_train_loss: float
    val_loss: float
    val_loss_oracle: float | None = None
    val_loss_is_oracle: bool = False
    """Whether `val_loss` itself is the oracle's, because the model has no causal rule."""
    bits_per_byte: float | None = None
    val_accuracy: float | None = None
    """Share of a task's held-out answers that are right."""
    val_accuracy_oracle: float | None = None
    tokens_per_s: float
    peak_memory_bytes: int | None = None
    parameters: int
    unique_non_embedding: int
    train_flops_per_token: float
    decode_flops_per_token: float
    kv_bytes_per_token: float


class Cell(Section):
    """One training of the study."""

    name: str
    variant: str
    seed: int
    lr: float
    status: Literal["finished", "failed", "missing"]
    error: str | None = None
    summary: Summary | None = None
    measures: Measures = Measures()
    evaluations: tuple[Evaluation, ...] = ()
    training: tuple[TrainingPoint, ...] = ()


class LearningRate(Section):
    """A variant at one learning rate: means over seeds, absent where a seed failed."""

    lr: float
    first_half: float | None
    second_half: float | None
    full: float | None
    full_spread: float | None


class Row(Section):
    """A variant, averaged over its seeds. Numbers are absent where no cell finished."""

    name: str
    kind: Kind
    twin_of: str | None = None
    twin: Twin | None = None
    unrouted: str | None = None
    """Variant with the same blocks and schedule in which every token takes all recursions."""
    seeds: int
    """Cells that the means are taken over."""
    failed: int = 0
    lr: float | None = None
    """Learning rate, the best one where several were tried."""
    parameters: float | None = None
    unique_non_embedding: float | None = None
    train_flops_per_token: float | None = None
    decode_flops_per_token: float | None = None
    tokens: float | None = None
    train_flops: float | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    peak_memory_bytes: float | None = None
    kv_bytes_per_token: float | None = None
    final_train_loss: float | None = None
    val_loss: float | None = None
    """Held-out loss under the rule that decoding uses; absent where a model has no such rule."""
    val_loss_spread: float | None = None
    """Standard deviation over seeds; absent for one seed."""
    val_loss_oracle: float | None = None
    """Held-out loss with top-k routing that sees the whole sequence."""
    bits_per_byte: float | None = None
    val_accuracy: float | None = None
    """Share of a task's held-out answers that are right, under the rule of `val_loss`."""
    val_accuracy_oracle: float | None = None
    """The same with top-k routing that sees the whole sequence."""
    mean_depth: float | None = None
    learning_rates: tuple[LearningRate, ...] = ()

    @property
    def finished(self) -> bool:
        return self.val_loss is not None


class Results(Section):
    """A whole study."""

    study: StudyConfig
    reference: str
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    configs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Resolved config of each variant."""
    environment: dict[str, Any] = Field(default_factory=dict)
    command: str = ""
    jobs: int = 1
    """Most cells that ran at a time; above 1, times and speeds are those of a shared machine."""
    findings: tuple[str, ...] = ()

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def cells_of(self, row: Row) -> list[Cell]:
        """Finished cells that the row's means are taken over."""
        return [
            cell
            for cell in self.cells
            if cell.variant == row.name and cell.status == "finished" and (row.lr is None or cell.lr == row.lr)
        ]

    @property
    def finished(self) -> list[Row]:
        """Rows with numbers, in the order of the study."""
        return [row for row in self.rows if row.finished]
