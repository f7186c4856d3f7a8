"""Study files: what is read, and what is refused with one sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from morex.loading import ConfigError, validate
from morex.study.plan import plan
from morex.study.spec import StudyConfig, as_overrides, load_study, studies


def study(**changes: Any) -> dict[str, Any]:
    return {"name": "mine", "variants": [{"name": "vanilla"}, {"name": "recursive"}]} | changes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(study(set={"train": {"lr": 0.01}})), encoding="utf-8")
    return path


def test_shipped_studies_are_found() -> None:
    assert {"demo", "iso-flop", "seed-more"} <= set(studies())


def test_a_mapping_becomes_overrides_with_kind_first() -> None:
    tree = {"model": {"mixer": {"d_ff": 8, "kind": "gelu"}}, "train.betas": [0.9, 0.99], "train": {"lr": 1e-5}}
    assert as_overrides(tree) == (
        "model.mixer.kind=gelu",
        "model.mixer.d_ff=8",
        "train.betas=[0.9, 0.99]",
        "train.lr=1.0e-05",
    )


def test_a_list_of_overrides_stays() -> None:
    assert as_overrides(["train.lr=1", "model.seed=2"]) == ("train.lr=1", "model.seed=2")


def test_the_name_of_the_file_is_the_default_name(tmp_path: Path) -> None:
    path = tmp_path / "by-file.yaml"
    path.write_text("variants: [{name: vanilla}]", encoding="utf-8")
    assert load_study(path).name == "by-file"


def test_a_study_starts_from_another(tmp_path: Path) -> None:
    """What it says itself comes after what the other says, and all else is the other's."""
    (tmp_path / "first.yaml").write_text(
        "variants: [{name: vanilla}]\nseeds: [1, 2]\ntitle: First\nset: {train: {lr: 0.5, steps: 7}}", encoding="utf-8"
    )
    second = tmp_path / "second.yaml"
    second.write_text("study: ./first.yaml\ntitle: Second\nset: {train.lr: 0.25}", encoding="utf-8")
    loaded, first = load_study(second), load_study(tmp_path / "first.yaml")
    assert (loaded.name, loaded.title, loaded.seeds, loaded.variants) == ("second", "Second", (1, 2), first.variants)
    train = plan(loaded).cells[0].config.train
    assert (train.lr, train.steps) == (0.25, 7)


def test_a_study_that_starts_from_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ring.yaml"
    path.write_text(f"study: {path}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"ring\.yaml' starts from itself: .* -> "):
        load_study(path)


def test_overrides_reach_the_study_or_every_variant(file: Path) -> None:
    loaded = load_study(file, ["seeds=[3, 4]", "budget={kind: tokens, value: 1e4}", "train.lr=0.5", "model.seed=1"])
    assert loaded.seeds == (3, 4)
    assert (loaded.budget.kind, loaded.budget.value) == ("tokens", 10_000)
    assert loaded.set == ("train.lr=0.01", "train.lr=0.5", "model.seed=1")


def test_what_is_written_is_what_is_read(file: Path) -> None:
    loaded = load_study(file)
    assert validate(StudyConfig, loaded.to_dict()) == loaded


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (study(variants=[{"name": "vanilla", "pre": 1}]), "unknown key 'variants.0.pre'; did you mean 'preset'"),
        (study(seed=[0]), "unknown key 'seed'; did you mean 'seeds' or 'sample.seed'?"),
        (study(variants=[]), "variants"),
        (study(variants=[{"name": "a/b"}]), "'a/b' must be letters, digits"),
        (study(variants=[{"name": "a"}, {"name": "a"}]), "'a' appears more than once"),
        (study(variants=[{"name": "a", "twin_of": "b"}]), "twin_of and twin go together"),
        (
            study(variants=[{"name": "vanilla"}, {"name": "t", "twin_of": "vanila", "twin": "equal_depth"}]),
            "did you mean 'vanilla'",
        ),
        (study(variants=[{"name": "t", "preset": "moe", "twin_of": "t", "twin": "equal_depth"}]), "give one of them"),
        (
            study(
                variants=[
                    {"name": "recursive"},
                    {"name": "t", "twin_of": "recursive", "twin": "equal_depth"},
                    {"name": "u", "twin_of": "t", "twin": "equal_depth"},
                ]
            ),
            "'t', which is a twin itself",
        ),
        (
            study(
                variants=[
                    {"name": "moe"},
                    {"name": "t", "twin_of": "moe", "twin": "equal_depth", "set": {"model.seed": 1}},
                ]
            ),
            "'model.seed=1' cannot be set",
        ),
        (study(variants=[{"name": "t", "twin_of": "x", "twin": "equal_size"}]), "equal_depth"),
        (study(budget={"kind": "tokens"}), "a budget of kind 'tokens' needs a value"),
        (study(budget={"kind": "hours", "value": 1}), "tokens"),
        (study(budget={"kind": "tokens", "value": -1}), "budget.value"),
        (study(seeds=[]), "seeds"),
        (study(seeds=[1, 1]), "seeds [1, 1] has a value twice"),
        (study(learning_rates=[1e-3, 1e-3]), "learning_rates"),
        (study(report={"reference": "recursiv"}), "did you mean 'recursive'"),
        (study(set=3), "must be a list of 'a.b=value' strings or a mapping"),
    ],
)
def test_faults_are_refused_with_one_sentence(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(StudyConfig, tree)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_unknown_studies_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown study 'dmeo'; did you mean 'demo'"):
        load_study("dmeo")
    with pytest.raises(ConfigError, match=r"study file 'missing\.yaml' does not exist"):
        load_study("missing.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: Wörter".encode("latin-1"), "is not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is not UTF-8 text"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "is not valid YAML: unacceptable character"),
        (b"variants: [", "is not valid YAML"),
        (b"name: 2024-13-01", "is not valid YAML: month must be in 1..12"),
        (b"", "must be a mapping with the keys name, title, "),
        (b"just words", "must be a mapping with the keys name, title, "),
        (b"- name: vanilla", "must be a mapping with the keys name, title, "),
    ],
)
def test_files_that_are_no_study(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_study(path)
    sentence = str(refused.value)
    assert sentence.startswith("study ") and f"'{path}' {words}" in sentence and "\n" not in sentence


def test_numbers_with_an_exponent_are_numbers(file: Path) -> None:
    """As in the overrides of a config: YAML 1.1 alone would read `2e1` as text, which is no number of steps."""
    assert load_study(file, ["report.map_tokens=2e1"]).report.map_tokens == 20


@pytest.mark.parametrize("override", ["seeds", "=3", "seeds=[1", "title=2024-13-01"])
def test_overrides_that_are_none(file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_study(file, [override])
