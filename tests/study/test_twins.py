"""Dense twins meet their target, exactly where it can be met, else within 1 %."""

import pytest

from morex.config import ModelConfig
from morex.loading import ConfigError, load_config, presets
from morex.model.count import count
from morex.model.lm import build_model
from morex.sections.depth import FixedConfig
from morex.sections.mixers import FeedForwardConfig
from morex.sections.schedule import ScheduleConfig
from morex.study.spec import Twin
from morex.study.twins import bench_twin, derive_twin, unrouted

SEQ_LEN = 128


def is_dense(model: ModelConfig) -> bool:
    return (
        isinstance(model.mixer, FeedForwardConfig)
        and isinstance(model.depth, FixedConfig)
        and model.schedule.sharing == "none"
        and not model.step_embedding
        and (model.input_injection, model.residual_scale, model.recursion_norms) == ("none", "none", False)
        and model.lora is None
    )


@pytest.mark.parametrize("name", presets())
def test_equal_depth(name: str) -> None:
    model = load_config(name).model
    twin = derive_twin(model, "equal_depth", SEQ_LEN)
    assert is_dense(twin)
    assert twin.schedule.resolved.num_blocks == model.schedule.resolved.unrolled_depth
    assert (twin.d_model, twin.vocab_size, twin.attention) == (model.d_model, model.vocab_size, model.attention)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", presets())
def test_equal_parameters(name: str, tiny: bool) -> None:
    model = load_config(name, tiny=tiny).model
    twin = derive_twin(model, "equal_parameters", SEQ_LEN)
    assert is_dense(twin)
    assert count(twin).unique_non_embedding == pytest.approx(count(model).unique_non_embedding, rel=0.01)
    assert count(twin).parameters == pytest.approx(count(model).parameters, rel=0.01)
    assert twin.d_model == model.d_model


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", presets())
def test_equal_flops(name: str, tiny: bool) -> None:
    model = load_config(name, tiny=tiny).model
    twin = derive_twin(model, "equal_flops", SEQ_LEN)
    assert is_dense(twin)
    wanted = count(model, seq_len=SEQ_LEN).train_flops_per_token
    assert count(twin, seq_len=SEQ_LEN).train_flops_per_token == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("twin", ["equal_parameters", "equal_flops"])
def test_a_dense_model_is_its_own_twin(twin: Twin) -> None:
    model = load_config("vanilla").model
    assert count(derive_twin(model, twin, SEQ_LEN)) == count(model)


def test_the_blocks_of_a_recursive_model_are_kept_where_they_fit() -> None:
    twin = derive_twin(load_config("recursive").model, "equal_parameters", SEQ_LEN)
    assert twin.schedule.layers == 4
    assert isinstance(twin.mixer, FeedForwardConfig)
    assert twin.mixer.d_ff == 704


def test_a_twin_builds_and_has_the_parameters_it_was_solved_for() -> None:
    model = load_config("more-tuned", tiny=True).model
    twin = derive_twin(model, "equal_parameters", SEQ_LEN)
    tensors = sum(parameter.numel() for parameter in build_model(twin).parameters())
    wanted = sum(parameter.numel() for parameter in build_model(model).parameters())
    assert tensors == pytest.approx(wanted, rel=0.01)


def test_widths_are_tried_where_the_own_one_cannot_meet_the_target() -> None:
    """Fewer FLOPs than one block of the own width has leave only a narrower model."""
    model = load_config(
        "moe", ["model.mixer.expert.d_ff=4", "model.mixer.router.experts=2", "model.schedule.layers=1"]
    ).model
    twin = derive_twin(model, "equal_flops", SEQ_LEN)
    wanted = count(model, seq_len=SEQ_LEN).train_flops_per_token
    assert count(twin, seq_len=SEQ_LEN).train_flops_per_token == pytest.approx(wanted, rel=0.01)
    assert twin.d_model < model.d_model
    assert twin.d_model % (2 * model.attention.heads) == 0


def test_what_cannot_be_met_is_refused() -> None:
    model = load_config(
        "moe", ["model.mixer.expert.d_ff=4", "model.schedule.layers=1", "model.attention.head_dim=32"]
    ).model
    with pytest.raises(ConfigError, match=r"no dense model of equal flops exists: .* use equal_depth"):
        derive_twin(model, "equal_flops", SEQ_LEN)


def test_bench_twins() -> None:
    assert bench_twin(load_config("vanilla").model) is None
    routed = load_config("mor-expert").model
    assert bench_twin(routed) == derive_twin(routed, "equal_depth", SEQ_LEN)
    experts = load_config("more").model
    twin = bench_twin(experts)
    assert twin == load_config("more-baseline").model
    both = routed.model_copy(update={"mixer": experts.mixer, "d_model": experts.d_model})
    twin = bench_twin(both)
    assert twin is not None
    assert is_dense(twin)
    assert twin.schedule == ScheduleConfig(layers=8)


def test_the_twin_of_experts_has_the_size_of_one() -> None:
    """Two matrices of hidden width 512 hold as much as the three of a swiglu of width 344, to 1 %."""
    for kind, hidden in (("relu", 344), ("gelu", 344), ("swiglu", 512)):
        model = load_config("moe", [f"model.mixer.expert={{kind: {kind}, d_ff: 512}}"]).model
        twin = bench_twin(model)
        assert twin is not None
        assert twin.mixer == FeedForwardConfig(kind="swiglu", d_ff=hidden)


def test_unrouted() -> None:
    assert unrouted(load_config("mor-token").model) == load_config("recursive").model
    assert unrouted(load_config("recursive").model) is None
