"""Depth routers: who decides how often a token recurs."""

import math
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from morex.sections.base import NonNegative, Section, Seed, Share


class RouterConfig(Section):
    """Base of the depth routers."""

    kind: str

    def check(self, recursions: int, option: str, number: str) -> None:
        """Refuses what does not fit so many recursions.

        Args:
            option: of this router, for the message.
            number: option that says how many recursions there are.
        """

    def options(self, recursions: int) -> dict[str, Any]:
        """Constructor options of the router, defaults filled in."""
        return self.model_dump(exclude={"kind"})


class FixedConfig(RouterConfig):
    """Every token takes all recursions; at call time any number."""

    kind: Literal["fixed"] = "fixed"


class GatedConfig(RouterConfig):
    """What routers with one gated decision per recursion share."""

    capacities: tuple[Share, ...] | None = None
    """Share of the tokens that takes recursion r, for r = 1..R; default (R - r + 1) / R."""
    alpha: PositiveFloat = 0.1
    """Factor on the gate."""
    gate: Literal["output", "delta"] = "output"
    """`output`: H + g * core(H), core's own residual included; `delta`: H + g * (core(H) - H)."""

    def shares(self, recursions: int) -> tuple[float, ...]:
        """Capacities c_1..c_R."""
        if self.capacities is not None:
            return self.capacities
        return tuple((recursions - r) / recursions for r in range(recursions))

    def options(self, recursions: int) -> dict[str, Any]:
        return super().options(recursions) | {"capacities": self.shares(recursions)}

    @property
    def is_nested(self) -> bool:
        """Whether only tokens active at r - 1 are candidates at r."""
        return True

    def check(self, recursions: int, option: str, number: str) -> None:
        shares = self.shares(recursions)
        if len(shares) != recursions:
            raise ValueError(
                f"{option}.capacities has {len(shares)} entries for {number} {recursions}; give one for each, or leave "
                "it out"
            )
        if self.is_nested and any(later > earlier for earlier, later in pairwise(shares)):
            raise ValueError(
                f"{option}.capacities {list(shares)} must not grow: only tokens active at r - 1 are candidates at r"
            )


class LearnedGateConfig(GatedConfig):
    """What routers that score tokens share."""

    score: Literal["sigmoid", "tanh", "unweighted"] = "sigmoid"
    """Gate of an active token: alpha * sigmoid(logit), alpha * tanh(logit), or 1 (`expert_choice` with `aux_loss` only:
    nothing else would train the router)."""
    router: Literal["linear", "mlp"] = "linear"
    """Scores from one linear map, or from two with GELU between (hidden width 2 d_model)."""
    z_weight: NonNegative = 0.0
    """Weight of the router z-loss, the mean squared logit of the candidates."""

    @model_validator(mode="after")
    def _router_learns(self) -> Self:
        own_loss = isinstance(self, ExpertChoiceConfig) and self.causal == "aux_loss" and self.causal_weight > 0
        if self.score == "unweighted" and not own_loss:
            raise ValueError(
                "depth.score 'unweighted' gives the router no gradient, except with depth.kind 'expert_choice', "
                "depth.causal 'aux_loss' and depth.causal_weight above 0; use sigmoid or tanh"
            )
        return self


class ExpertChoiceConfig(LearnedGateConfig):
    """Mixture of Recursions, expert choice: each recursion picks its top share of the candidates."""

    kind: Literal["expert_choice"]
    causal: Literal["aux_loss", "aux_router", "none"] = "aux_loss"
    """How the causal rule of inference (logit >= 0) is learned: on the router's own logits, by a second predictor with
    stopped gradient, or not at all (then only the oracle loss exists and decoding is refused)."""
    causal_weight: NonNegative = 0.001
    """Weight of the binary cross-entropy against top-k membership."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which capacities fall from 1 to their value along a cosine."""
    hierarchical: bool = True
    """Only tokens active at r - 1 are candidates at r; if false, every token is a candidate at every r."""

    @property
    def is_nested(self) -> bool:
        return self.hierarchical


class ChoosingConfig(RouterConfig):
    """What routers share that choose among several depths."""

    def check(self, recursions: int, option: str, number: str) -> None:
        if recursions == 1:
            raise ValueError(f"{option}.kind {self.kind!r} needs depths to choose from; {number} is 1, use 2 or more")


class TokenChoiceConfig(ChoosingConfig):
    """Mixture of Recursions, token choice: each token chooses its depth once, before recursion 1."""

    kind: Literal["token_choice"]
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Activation of the R depth logits."""
    alpha: PositiveFloat | None = None
    """Factor on the gate; default 1 for softmax, 0.1 for sigmoid."""
    temperature: PositiveFloat = 1.0
    """Divides the logits."""
    gate: Literal["last", "each"] = "last"
    """`last`: gate only the last update, H1 + g * core^i(H1); `each`: gate every recursion (the paper's equation)."""
    balance: Literal["loss", "loss_free", "none"] = "loss"
    """How depths are kept in use: a balance loss, or a bias on the choice that is moved after every step."""
    balance_weight: NonNegative = 0.1
    """Weight of the balance loss R * sum f_i P_i."""
    balance_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the weight of the balance loss rises from 0."""
    bias_rate: NonNegative = 0.001
    """Rate u of the loss-free bias."""
    router: Literal["linear", "mlp"] = "linear"
    """Scores from one linear map, or from two with GELU between (hidden width 2 d_model)."""
    z_weight: NonNegative = 0.0
    """Weight of the router z-loss, the mean squared logsumexp of the logits."""


class ThresholdConfig(LearnedGateConfig):
    """Candidates above a tracked quantile are active: the same causal rule in training and in inference."""

    kind: Literal["threshold"]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share of the old threshold that is kept at each update."""


class StoppingConfig(ChoosingConfig):
    """What routers share that let a token stop by a probability, which one unit gives after each recursion."""

    initial_bias: float | None = None
    """Bias of the unit before training; default -ln(R - 1): a probability of 1/R after each recursion."""

    def options(self, recursions: int) -> dict[str, Any]:
        # One recursion is refused by the model, after it has asked for nothing here.
        bias = -math.log(max(1, recursions - 1)) if self.initial_bias is None else self.initial_bias
        return super().options(recursions) | {"initial_bias": bias}


class HaltingConfig(StoppingConfig):
    """Adaptive computation time: a token recurs until its halting probabilities sum to 1 - epsilon."""

    kind: Literal["halting"]
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """A token stops where its halting probabilities sum to 1 - epsilon or more."""
    ponder_weight: NonNegative = 0.01
    """Weight of the ponder cost, the mean of recursions taken plus remainder."""


class ExitGateConfig(StoppingConfig):
    """Exit gate of Ouro: the loss is expected over all exits, and in inference a token leaves at a likely one."""

    kind: Literal["exit_gate"]
    threshold: Share = 0.5
    """In inference a token leaves where its exit probabilities sum to this or more; 1 hardly lets any leave early."""
    entropy_weight: NonNegative = 0.1
    """Weight beta of the entropy of the exit distribution, which the loss rewards."""


class SampledConfig(RouterConfig):
    """Huginn: in training all tokens take 1 + Poisson(exp(Normal(ln R - spread^2 / 2, spread))) recursions, drawn anew
    for each step; in inference R, or any number."""

    kind: Literal["sampled"]
    spread: NonNegative = 0.5
    """Standard deviation s of the normal variable."""
    gradient_recursions: PositiveInt | None = 8
    """The gradient goes through the last so many recursions; `null`: through all."""
    state: Literal["input", "random"] = "input"
    """First state of the core: its input; or, which needs input_injection, N(0, state_std) in training and zeros in
    eval."""
    state_std: NonNegative = math.sqrt(2 / 5)
    """Standard deviation of the random first state."""
    curriculum_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which R rises in a line from 0 in the draws: the mean from 1 recursion to 1 + R."""
    seed: Seed = 0
    """Seed of the draws."""


class RandomConfig(GatedConfig):
    """Control: active by a hash of (seed, position, recursion); the gate is the constant alpha / 2."""

    kind: Literal["random"]
    seed: Seed = 0
    """Seed of the hash."""


StepsRouterConfig = Annotated[
    FixedConfig | ExpertChoiceConfig | TokenChoiceConfig | ThresholdConfig | HaltingConfig | RandomConfig,
    Field(discriminator="kind"),
]
DepthConfig = Annotated[StepsRouterConfig | ExitGateConfig | SampledConfig, Field(discriminator="kind")]
