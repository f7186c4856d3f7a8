"""Cells, steps under a budget, and what makes variants comparable."""

from pathlib import Path
from typing import Any

import pytest

from morex.loading import ConfigError, load_config
from morex.model.count import count
from morex.study.plan import describe, plan
from morex.study.spec import StudyConfig, load_study, studies
from study.helpers import tiny_study


def planned(tmp_path: Path, *variants: dict[str, Any], **changes: Any) -> Any:
    return plan(tiny_study(tmp_path, *variants, **changes))


def test_cells_are_variants_times_seeds_times_learning_rates(tmp_path: Path) -> None:
    found = planned(tmp_path, seeds=[0, 5], learning_rates=[1e-3, 3e-4])
    assert [cell.name for cell in found.cells] == [
        f"{name}-s{seed}-lr{lr}" for seed in (0, 5) for name in ("vanilla", "mor-expert") for lr in ("0.001", "0.0003")
    ]
    near = planned(tmp_path, learning_rates=[1e-3, 1.0000000001e-3])
    assert len({cell.name for cell in near.cells}) == len(near.cells) == 4
    cell = found.cells[-1]
    assert (cell.config.model.seed, cell.config.train.seed, cell.config.train.lr) == (5, 5, 3e-4)


def test_seeds_leave_the_split_alone(tmp_path: Path) -> None:
    found = planned(tmp_path, seeds=[0, 5])
    assert {cell.config.data.seed for cell in found.cells} == {0}


def test_tokens_become_steps(tmp_path: Path) -> None:
    found = planned(tmp_path, budget={"kind": "tokens", "value": 32 * 10})
    assert {cell.config.train.steps for cell in found.cells} == {10}


def test_flops_become_steps_by_closed_form(tmp_path: Path) -> None:
    found = planned(tmp_path, budget={"kind": "flops", "value": 1e9})
    dense, routed = (cell.config for cell in found.cells)
    assert routed.train.steps > dense.train.steps
    for cell in found.cells:
        per_token = count(cell.config.model, seq_len=16).train_flops_per_token
        assert cell.config.train.steps == round(1e9 / per_token / 32)
        assert cell.train_flops == pytest.approx(1e9, rel=0.01)


def test_seconds_end_a_cell_by_the_clock(tmp_path: Path) -> None:
    found = planned(tmp_path, budget={"kind": "seconds", "value": 2})
    assert {cell.max_seconds for cell in found.cells} == {2}
    assert all(cell.config.train.steps > 10**6 for cell in found.cells)


def test_steps_may_be_each_variants_own(tmp_path: Path) -> None:
    study = tiny_study(
        tmp_path, {"name": "vanilla", "set": {"train.steps": 3}}, {"name": "moe", "set": {"train.steps": 4}}, budget={}
    )
    assert [cell.config.train.steps for cell in plan(study).cells] == [3, 4]


def test_a_budget_of_less_than_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"variant 'vanilla': a budget of 3 tokens is less than one step of 32 tokens"
    ):
        planned(tmp_path, budget={"kind": "tokens", "value": 3})


def test_the_variant_s_changes_come_after_the_study_s(tmp_path: Path) -> None:
    found = planned(tmp_path, {"name": "vanilla", "set": {"train.lr": 0.5}}, {"name": "wide", "preset": "vanilla"})
    assert [cell.config.train.lr for cell in found.cells] == [0.5, 0.01]


def test_twins_are_derived_from_the_changed_model(tmp_path: Path) -> None:
    twin = {"name": "twin", "twin_of": "recursive", "twin": "equal_parameters", "set": {"train.lr": 0.02}}
    found = planned(tmp_path, twin, {"name": "recursive"})
    first, second = found.variants
    assert (first.kind, second.kind) == ("dense", "recursive")
    assert first.config.model.d_model == 16
    assert first.config.train.lr == 0.02
    assert count(first.config.model).unique_non_embedding == pytest.approx(
        count(second.config.model).unique_non_embedding, rel=0.01
    )


def test_the_unrouted_form_is_found_by_its_config(tmp_path: Path) -> None:
    found = planned(
        tmp_path,
        {"name": "three", "preset": "recursive"},
        {"name": "two", "preset": "recursive", "set": {"model.schedule.recursions": 2}},
        {"name": "mor-token"},
        {"name": "mor-random"},
        {"name": "alone", "preset": "mor-expert", "set": {"model.schedule.recursions": 6}},
    )
    assert [variant.unrouted for variant in found.variants] == [None, None, "three", "three", None]


def test_the_reference_is_the_first_dense_variant_or_the_one_asked_for(tmp_path: Path) -> None:
    variants = ({"name": "recursive"}, {"name": "vanilla"})
    assert planned(tmp_path, *variants).reference == "vanilla"
    assert planned(tmp_path, *variants, report={"reference": "recursive"}).reference == "recursive"
    assert planned(tmp_path, {"name": "recursive"}, {"name": "mor-token"}).reference == "recursive"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.vocab_size=300", "differ in model.vocab_size (257 and 300)"),
        ("train.seq_len=8", "differ in train.seq_len (16 and 8)"),
        ("data.corpus=other.txt", "differ in data.corpus"),
        ("data.tokenizer.kind=char", "differ in data.tokenizer ({'kind': 'byte'} and {'kind': 'char'})"),
        ("data.seed=3", "differ in data.seed (0 and 3)"),
    ],
)
def test_losses_that_are_not_comparable_are_refused(tmp_path: Path, change: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(tmp_path, {"name": "vanilla"}, {"name": "other", "preset": "vanilla", "set": [change]})
    assert str(refused.value).startswith("variants 'vanilla' and 'other' ")
    assert words in str(refused.value)


def test_a_fault_of_a_variant_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"variant 'x': unknown preset 'vanila'; did you mean 'vanilla'"):
        planned(tmp_path, {"name": "x", "preset": "vanila"})
    with pytest.raises(ConfigError, match=r"variant 'moe': unknown key 'model.width'"):
        planned(tmp_path, {"name": "moe", "set": {"model.width": 3}})


@pytest.mark.parametrize("name", studies())
def test_shipped_studies_work_out(name: str) -> None:
    study = load_study(name)
    found = plan(study)
    assert study.title
    assert study.description
    assert {variant.kind for variant in found.variants} >= {"dense"}
    assert all(cell.config.train.steps > 0 for cell in found.cells)


def test_the_demo_shows_every_family() -> None:
    found = plan(load_study("demo"))
    assert len(found.variants) >= 7
    assert {variant.kind for variant in found.variants} == {"dense", "recursive", "routed", "experts"}
    routers = {variant.config.model.depth.kind for variant in found.variants}
    assert {"expert_choice", "token_choice", "threshold"} <= routers
    assert any(variant.twin == "equal_parameters" for variant in found.variants)
    assert found.variants[0].config.data.corpus == "sotu"


def test_seed_more_has_the_settings_of_its_author() -> None:
    study = load_study("seed-more")
    found = plan(study)
    assert study.seeds == (0, 1, 2)
    assert study.learning_rates == (3e-4, 1e-3, 3e-3)
    assert len(found.cells) == 27
    for variant in found.variants:
        config = variant.config
        assert config.data.corpus == "tinyshakespeare"
        assert (config.data.tokenizer.kind, config.data.windows, config.data.val_fraction) == ("char", "random", 0.1)
        assert (config.train.steps, config.train.batch_size, config.train.seq_len) == (1000, 32, 128)
        assert (config.train.schedule, config.train.warmup_steps, config.train.decay) == ("constant", 0, "all")
        assert config.train.precision == "fp32"
        assert config.model.init == "plain"
        assert config.train == load_config("more-baseline").train.model_copy(
            update={
                key: getattr(config.train, key) for key in ("eval_every", "log_every", "checkpoint_every", "precision")
            }
        )
    counts = {variant.name: count(variant.config.model).parameters for variant in found.variants}
    assert counts["more"] == 1_457_920
    assert counts["more-baseline"] == 336_640


def test_iso_flop_spends_one_budget_on_every_router() -> None:
    found = plan(load_study("iso-flop"))
    for cell in found.cells:
        assert cell.train_flops == pytest.approx(2e13, rel=0.01)
    routers = {(v.config.model.depth.kind, v.config.model.schedule.recursions) for v in found.variants}
    assert {(kind, r) for kind in ("expert_choice", "token_choice", "threshold", "random") for r in (2, 3)} <= routers
    assert all(variant.unrouted for variant in found.variants if variant.kind == "routed")


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("vanilla", "8 blocks of width 256, swiglu 704"),
        ("mor-token", "1 + 2 × 3 + 1 blocks of width 256, swiglu 704, token choice"),
        ("more", "2 blocks of width 128, 2 of 4 recursive experts, 3 steps each"),
        ("moe", "2 blocks of width 128, 1 of 4 experts"),
    ],
)
def test_a_model_in_one_line(preset: str, words: str) -> None:
    assert describe(load_config(preset)) == words


def test_a_sequence_is_said_to_be_one() -> None:
    config = load_config("recursive", ["model.schedule.sharing=sequence", "model.schedule.layers=6"])
    assert describe(config) == "2 × 3 blocks in sequence of width 256, swiglu 704"


def test_a_study_is_a_study_without_extras() -> None:
    assert plan(StudyConfig(name="one", variants=({"name": "vanilla"},))).cells[0].name == "vanilla-s0"
