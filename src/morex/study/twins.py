"""Dense twins, solved by closed form: the model without routing, sharing or experts that a variant is compared with."""

from collections.abc import Callable, Iterator

from morex.config import ModelConfig
from morex.loading import ConfigError, dense_twin_mixer, is_depth_routed
from morex.model.count import count
from morex.sections.depth import FixedConfig
from morex.sections.mixers import FeedForwardConfig
from morex.sections.schedule import ScheduleConfig
from morex.study.spec import Twin

TOLERANCE = 0.01
Measure = Callable[[ModelConfig], float]


def derive_twin(model: ModelConfig, twin: Twin, seq_len: int) -> ModelConfig:
    """The dense twin of a model.

    Args:
        model: the variant.
        twin: `equal_depth` keeps the unrolled depth, `equal_parameters` the unique non-embedding parameters and
            `equal_flops` the training FLOPs per token at `seq_len`, both to 1 %.
        seq_len: tokens per training sequence, which attention FLOPs depend on.

    Raises:
        ConfigError: no dense model comes within 1 %.
    """
    dense = unrolled(dense_twin_mixer(model))
    if twin == "equal_depth":
        return dense
    if twin == "equal_parameters":
        return _solve(dense, _size, _size(model), twin)

    def flops(candidate: ModelConfig) -> float:
        return count(candidate, seq_len=seq_len).train_flops_per_token

    return _solve(dense, flops, flops(model), twin)


def bench_twin(model: ModelConfig) -> ModelConfig | None:
    """The twin that speed is measured against, or None for a model that is dense itself.

    A model with recursions is measured against its unrolled form with the same mixers' dense form, one with experts
    against the same model with the mixer `swiglu`.
    """
    dense = dense_twin_mixer(model)
    if is_depth_routed(model) or model.schedule.recursions > 1:
        dense = unrolled(dense)
    return None if dense == model else dense


def unrouted(model: ModelConfig) -> ModelConfig | None:
    """The same blocks and schedule with every token taking all recursions; None where no router decides depth."""
    return model.model_copy(update={"depth": FixedConfig()}) if is_depth_routed(model) else None


def unrolled(model: ModelConfig) -> ModelConfig:
    """The same unrolled depth with a block of its own at every step, and no router."""
    return model.model_copy(
        update={
            "schedule": ScheduleConfig(layers=model.schedule.resolved.unrolled_depth),
            "depth": FixedConfig(),
            "kv": "per_recursion",
            "step_embedding": False,
            "input_injection": "none",
            "residual_scale": "none",
            "recursion_norms": False,
            "lora": None,
        }
    )


def _size(model: ModelConfig) -> float:
    return count(model).unique_non_embedding


def _solve(dense: ModelConfig, measure: Measure, target: float, twin: Twin) -> ModelConfig:
    """The model closest to `dense` in shape whose measure is within 1 % of the target.

    The width is kept if any number of blocks and d_ff reach the target; among those the d_ff nearest to the model's own
    wins. Otherwise widths that suit the heads are tried, nearest first.
    """
    for width in _widths(dense):
        found = _depth_and_hidden(_with_width(dense, width), measure, target)
        if found is not None:
            return found
    raise ConfigError(
        f"no dense model of {twin.replace('_', ' ')} exists: a width of {dense.d_model} and its neighbours do not come "
        f"within {TOLERANCE:.0%} of {target:,.0f}; use equal_depth"
    )


def _depth_and_hidden(dense: ModelConfig, measure: Measure, target: float) -> ModelConfig | None:
    """Blocks L and hidden width d_ff with the measure within 1 % of the target, d_ff as near to the model's as can be.

    The measure is linear in L and in L * d_ff, so three evaluations give it for every pair.
    """
    own = _hidden(dense)
    one, two, wide = (measure(_shaped(dense, layers, hidden)) for layers, hidden in ((1, own), (2, own), (1, 2 * own)))
    per_layer, per_hidden = two - one, (wide - one) / own
    fixed = one - per_layer
    best: tuple[float, ModelConfig] | None = None
    guess = max(1, round((target - fixed) / per_layer))
    for layers in range(max(1, guess // 2), 2 * guess + 2):
        exact = own + (target - fixed - layers * per_layer) / (layers * per_hidden)
        for grain in (32, 8, 2, 1):
            hidden = round(exact / grain) * grain
            if not dense.d_model / 4 <= hidden <= 16 * dense.d_model:
                continue
            candidate = _shaped(dense, layers, hidden)
            if abs(measure(candidate) / target - 1) <= TOLERANCE:
                distance = abs(hidden / own - 1)
                if best is None or distance < best[0]:
                    best = distance, candidate
                break
    return best[1] if best else None


def _widths(dense: ModelConfig) -> Iterator[int]:
    """The model's own width, then widths that give its heads an even width, nearest first, between D/4 and 4 D."""
    yield dense.d_model
    if dense.attention.head_dim is not None:
        return
    grain = 2 * dense.attention.heads
    others = range(max(grain, dense.d_model // 4 // grain * grain), 4 * dense.d_model + 1, grain)
    yield from sorted((width for width in others if width != dense.d_model), key=lambda w: abs(w - dense.d_model))


def _with_width(dense: ModelConfig, width: int) -> ModelConfig:
    if width == dense.d_model:
        return dense
    hidden = max(1, round(_hidden(dense) * width / dense.d_model))
    return _shaped(dense.model_copy(update={"d_model": width}), 1, hidden)


def _shaped(dense: ModelConfig, layers: int, hidden: int) -> ModelConfig:
    assert isinstance(dense.mixer, FeedForwardConfig)
    mixer = dense.mixer.model_copy(update={"d_ff": hidden})
    return dense.model_copy(update={"mixer": mixer, "schedule": ScheduleConfig(layers=layers)})


def _hidden(dense: ModelConfig) -> int:
    assert isinstance(dense.mixer, FeedForwardConfig)
    return dense.mixer.hidden(dense.d_model)
