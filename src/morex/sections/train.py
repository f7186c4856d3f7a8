"""Training and evaluation."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from morex.sections.base import NonNegative, Section, Seed, Share, divisors


class AnomalyConfig(Section):
    """What is done about a step whose loss or gradient norm is not finite, or far above its running mean."""

    action: Literal["skip", "roll_back", "stop"] = "skip"
    """`skip` leaves the batch out, `roll_back` goes back to the last checkpoint and on with later batches, `stop` ends
    the training; nothing wrong reaches the weights in any case."""
    z_score: PositiveFloat | None = None
    """Standard deviations above its running mean from which on a finite value counts too; default: none does."""
    window: Annotated[int, Field(ge=2)] = 100
    """Steps that the running means go over, and that there must have been before a finite value counts."""
    limit: PositiveInt = 10
    """Anomalies in a row that end the training."""


class TrainConfig(Section):
    """One training. Batches are counted in sequences per optimizer step."""

    steps: Annotated[int, Field(ge=0)] = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step."""
    accumulation: PositiveInt = 1
    """Microbatches that a step is computed in; must divide batch_size."""
    seq_len: PositiveInt = 128
    """Tokens per sequence."""
    depth: Literal["router", "difficulty"] = "router"
    """Who decides how often tokens recur, in training and its evaluations: the model's router, or for a generated task
    the difficulty, which each example then takes as many recursions as (depth.kind 'fixed')."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices of the blocks, each expert's by themselves, and AdamW for everything else."""
    lr: PositiveFloat = 1e-3
    """Highest learning rate."""
    schedule: Literal["cosine", "trapezoid", "constant"] = "cosine"
    """Learning rate after warm-up: cosine to min_lr_ratio, flat with a linear cool-down at the end, or flat."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""
    cooldown_fraction: Share = 0.2
    """Share of the steps in which `trapezoid` falls to min_lr_ratio."""
    budgets: tuple[PositiveInt, ...] = ()
    """Numbers of steps below `steps` for which a `trapezoid` run can be branched: it saves, and keeps, a checkpoint
    where the cool-down of each would begin."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate over the highest."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """`matrices` spares norms, biases and embeddings; `all` spares nothing."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: PositiveFloat = 1e-8
    """Term in AdamW's denominator."""
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Decay rate of Muon's momentum."""
    clip: NonNegative = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    anomaly: AnomalyConfig = AnomalyConfig()
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """`bf16` and `fp16` are autocast over fp32 weights, `fp16` with dynamic loss scaling; `auto` is resolved once by
    device and width and written to the run."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    recompute: Literal["nothing", "selective", "steps", "recursions"] = "nothing"
    """What is computed once more where the backward pass needs it. `steps`: a step keeps its input alone. `recursions`:
    a whole recursion of the core does. `selective`: a step keeps its input and the results of linear maps, and norms,
    activations and attention are computed again."""
    compile: bool = False
    """Whether torch compiles what blocks do before and behind attention, and the loss. On a CPU that takes a C++
    compiler."""
    shards: PositiveInt | None = None
    """Ranks that one copy of weights, gradients and optimizer state is divided over; 1 gives each rank a copy;
    default: all of them."""
    expert_shards: PositiveInt = 1
    """Ranks that the experts of every expert layer are divided over: each has some of them, and tokens travel. Divides
    their number and that of all ranks; `shards` is then about the other weights."""
    core_units: Literal["auto", "core", "blocks"] = "auto"
    """What is gathered of a divided core at a time: `core` all of it, once a pass, or `blocks` each block whenever it
    runs, which needs less memory and more exchange; `auto`: blocks from three billion parameters on."""
    threads: PositiveInt | None = None
    """CPU threads; default: torch's own."""
    seed: Seed = 0
    """Seed of everything random in training, the order of windows included."""
    log_every: PositiveInt = 10
    """Steps between metric lines."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Who is told of metric lines as well; metrics.jsonl has them in any case."""
    project: Annotated[str, Field(min_length=1)] = "morex"
    """Name that trackio and wandb keep runs under."""
    eval_every: Annotated[int, Field(ge=0)] = 250
    """Steps between evaluations of the held-out set; 0 evaluates at the end only."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 500
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that this divides are kept for good."""
    hang_seconds: PositiveFloat | None = 1800
    """Seconds without a step, an evaluation or a checkpoint after which a rank hangs and the training ends; null:
    never."""
    save_in_background: bool | None = None
    """Whether training goes on while a checkpoint is written, from a copy in memory; default: on a GPU."""

    @property
    def policy(self) -> str | None:
        """The depth policy of training and its evaluations; None: the router's."""
        return None if self.depth == "router" else self.depth

    def cooldown_steps(self, steps: int) -> int:
        """Steps of the cool-down in a `trapezoid` run of so many steps."""
        return max(1, round(self.cooldown_fraction * steps))

    @property
    def branch_points(self) -> frozenset[int]:
        """Steps at which the cool-downs of `budgets` begin."""
        return frozenset(budget - self.cooldown_steps(budget) for budget in self.budgets)

    @model_validator(mode="after")
    def _budgets_of_a_trapezoid(self) -> Self:
        if self.budgets and self.schedule != "trapezoid":
            raise ValueError(
                f"train.budgets are for train.schedule 'trapezoid', which is flat until a cool-down, and it is "
                f"{self.schedule!r}; use 'trapezoid', or leave train.budgets out"
            )
        return self

    @model_validator(mode="after")
    def _shows_operators(self) -> Self:
        if self.compile and self.recompute == "selective":
            raise ValueError(
                "train.recompute 'selective' chooses among operators, and blocks that train.compile has compiled show "
                "none; use train.recompute 'steps' or 'recursions', or leave train.compile out"
            )
        return self

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.accumulation {self.accumulation} does not divide train.batch_size {self.batch_size}; use "
                f"{divisors(self.batch_size)}"
            )
        if self.betas[0] >= 1 or self.betas[1] >= 1:
            raise ValueError(f"train.betas {list(self.betas)} must be below 1")
        return self


class EvalConfig(Section):
    """Evaluation on the whole held-out set, in windows of train.seq_len."""

    batch_size: PositiveInt = 32
    """Windows that are evaluated together."""
    depths: bool = False
    """Also report the loss at each fixed depth 1..R."""
    deepest: PositiveInt | None = None
    """Last depth of `depths`, for models that take any number of recursions; default: R."""

    @model_validator(mode="after")
    def _deepest_of_depths(self) -> Self:
        if self.deepest is not None and not self.depths:
            raise ValueError(f"eval.deepest {self.deepest} is the last of eval.depths; set eval.depths to true as well")
        return self
