"""Memory of a rank, against built models and against how FSDP2 divides them."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import morex
from morex.model.lm import LanguageModel
from morex.scaling.activations import Recompute
from morex.scaling.memory import Layout, memory, units_of

HERE = Path(__file__).parent


def numel(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("preset", morex.presets())
def test_units_are_those_of_the_model(preset: str) -> None:
    """For every preset: the core, the blocks around it, and the rest."""
    config = morex.load_config(preset, tiny=True).model
    model, units = morex.build_model(config, device="meta"), units_of(config)
    assert isinstance(model, LanguageModel)
    stack = model.stack
    outer = [*stack.prelude, *stack.coda]
    assert units.core == numel(stack.core)
    assert units.outer == len(outer)
    assert all(units.block == numel(block) for block in outer)
    assert units.total == numel(model)


def test_ranks_hold_their_part(tmp_path: Path) -> None:
    """Weights and optimizer state of the fullest of 8 ranks in 2 copies are within 3 % of what FSDP2 leaves it."""
    program = HERE / "division_program.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    held = int(done.stdout.split()[-1])
    config = morex.load_config("mor-expert", ["train.batch_size=8"])
    predicted = memory(config, Layout(8, 4, 1, "nothing"), "fp32")
    assert predicted.parameters == pytest.approx(held, rel=0.03)
    assert predicted.optimizer == 2 * predicted.parameters


def test_what_a_layout_changes() -> None:
    """More shards, more microbatches and recomputation each need less, up to what undivided gradients add."""
    config = morex.load_config("mor-llm-medium", ["train.batch_size=64", "train.seq_len=1024"])

    def peak(*layout: int, recompute: Recompute = "nothing") -> float:
        return memory(config, Layout(8, *layout, recompute), "bf16").peak

    assert peak(8, 1) < peak(2, 1) < peak(1, 1)
    assert peak(8, 4) < peak(8, 2) < peak(8, 1)
    assert peak(8, 1, recompute="recursions") < peak(8, 1)
    assert peak(8, 1, recompute="steps") < peak(8, 1, recompute="selective") < peak(8, 1)
    undivided = memory(config, Layout(8, 8, 8, "steps"), "bf16")
    assert undivided.gathered >= 4 * units_of(config.model).total


def test_the_core_is_gathered_as_a_whole() -> None:
    """However many share it: the peak never falls below the core's weights and gradients."""
    config = morex.load_config("mor-llm-large", ["train.batch_size=1024", "train.seq_len=16"])
    held = memory(config, Layout(1024, 1024, 1, "steps"), "bf16")
    assert held.gathered > 2 * 4 * units_of(config.model).core
    assert held.states < 0.02 * held.gathered


def test_blocks_as_units_leave_the_gradients_of_the_core() -> None:
    config = morex.load_config("mor-llm-large", ["train.batch_size=1024", "train.seq_len=16"])
    whole, parts = (memory(config, Layout(1024, 1024, 1, "steps", by_block), "bf16") for by_block in (False, True))
    units = units_of(config.model)
    saved = 4 * units.core * (1 - 2 / units.inner)
    assert whole.peak - parts.peak > 0.95 * saved
    assert parts.gathered > 4 * units.core


def test_an_only_recursion_is_computed_again_before_its_gradients() -> None:
    """All of it is there when none of them is; of several recursions, later ones have left theirs."""
    size = ["train.batch_size=8", "train.seq_len=512"]
    for preset, lacks in (("vanilla", 1), ("mor-expert", 0)):
        config = morex.load_config(preset, size)
        steps, whole = (memory(config, Layout(2, 2, 1, again), "fp32") for again in ("steps", "recursions"))
        assert whole.moment == "backward"
        units = units_of(config.model)
        neighbours = 2 * units.block if units.outer else 0
        assert whole.gathered == 4 * (2 * units.root + (2 - lacks) * units.core + neighbours)
        assert whole.activations.again > steps.activations.again


def test_one_rank_gathers_nothing() -> None:
    config = morex.load_config("mor-expert")
    held = memory(config, Layout(1, 1, 1, "nothing"), "fp32")
    assert held.states == 4 * 4 * units_of(config.model).total
    assert held.peak >= held.parameters + held.optimizer + held.activations.kept
    assert memory(config, Layout(1, 1, 1, "nothing"), "fp64").peak == pytest.approx(2 * held.peak, rel=0.01)


def test_bf16_keeps_less_and_casts_weights() -> None:
    config = morex.load_config("mor-llm-medium", ["train.batch_size=8"])
    wide, narrow = (memory(config, Layout(1, 1, 1, "nothing"), precision).activations for precision in ("fp32", "bf16"))
    assert narrow.recursions[0] < wide.recursions[0]
    assert wide.weights == 0
    matrices = units_of(config.model).total - config.model.vocab_size * config.model.d_model
    assert narrow.weights == pytest.approx(2 * matrices, rel=0.01)


def test_recursions_keep_their_capacities() -> None:
    """Recursion r of `expert_choice` keeps c_r of the first one."""
    config = morex.load_config("mor-expert", ["train.batch_size=8", "train.seq_len=1024"])
    first, second, third = memory(config, Layout(1, 1, 1, "nothing"), "bf16").activations.recursions
    assert second == pytest.approx(2 / 3 * first)
    assert third == pytest.approx(1 / 3 * first)
