"""Files and overrides of a config: what is read, and what is refused with one sentence."""

from pathlib import Path
from typing import Any

import pytest

import morex
from morex.loading import ConfigError, load_config, with_override


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("# Wörter".encode("latin-1"), "is not UTF-8 text"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "is not valid YAML: unacceptable character"),
        (b"model: [", "is not valid YAML"),
        (b"", "must be a mapping with the keys model, "),
        (b"- model", "must be a mapping with the keys model, "),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    sentence = str(refused.value)
    assert sentence.startswith("config ") and f"'{path}' {words}" in sentence and "\n" not in sentence


def test_a_file_starts_from_a_preset_or_another_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("preset: recursive\ntrain: {lr: 0.5}")
    (tmp_path / "b.yaml").write_text(f"preset: {tmp_path / 'a.yaml'}\nmodel: {{seed: 7}}")
    loaded = load_config(tmp_path / "b.yaml")
    assert loaded == load_config("recursive", ["train.lr=0.5", "model.seed=7"])
    (tmp_path / "a.yaml").write_text(f"preset: {tmp_path / 'b.yaml'}")
    with pytest.raises(ConfigError, match="starts from itself"):
        load_config(tmp_path / "b.yaml")


def test_a_config_of_another_program_is_told_its_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "small_model.yaml").write_text("model: {hidden_size: 512, num_recursion_blocks: 4}")
    with pytest.raises(ConfigError, match=r"unknown key 'model\.hidden_size'; known: attention, "):
        load_config(tmp_path / "small_model.yaml")


def test_sources_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'vanila'; did you mean 'vanilla'"):
        load_config("vanila")
    for source in ("missing.yaml", "a/b", Path("vanilla")):
        with pytest.raises(ConfigError, match=f"config file '{source}' does not exist"):
            load_config(source)
    assert "vanilla" in morex.presets()


def test_an_override_leaves_the_tree_as_it_was() -> None:
    tree = {"train": {"lr": 1.0, "steps": 2}}
    assert with_override(tree, "train.lr=3e-4") == {"train": {"lr": 3e-4, "steps": 2}}
    assert with_override(tree, "a.b.c = [1, x]") == {**tree, "a": {"b": {"c": [1, "x"]}}}
    assert tree == {"train": {"lr": 1.0, "steps": 2}}


@pytest.mark.parametrize("override", ["train.lr", "=3", "train.lr=[1", "train.lr=2024-13-01"])
def test_overrides_that_are_none(override: str) -> None:
    with pytest.raises(ConfigError, match=r"^override '.*(must have the form a\.b=value|the value is not valid YAML)$"):
        load_config("vanilla", [override])


@pytest.mark.parametrize("preset", morex.presets())
def test_a_tiny_form_asks_for_no_tokenizer_that_it_cannot_hold(preset: str) -> None:
    wanted = load_config(preset, tiny=True).data.tokenizer
    assert wanted.vocab_size is None and wanted.kind == load_config(preset).data.tokenizer.kind
    assert (
        load_config(preset, ["data.tokenizer={kind: bpe, vocab_size: 90}"], tiny=True).data.tokenizer.vocab_size == 90
    )


@pytest.mark.parametrize("overrides", ["train.steps=100", {"train.steps": 100}])
def test_overrides_that_are_no_list(overrides: Any) -> None:
    with pytest.raises(ConfigError, match=r"overrides must be a list such as \['train.steps=100'\], not "):
        load_config("vanilla", overrides)


@pytest.mark.parametrize("use", [morex.build_model, morex.count])
def test_what_is_no_config_of_a_model(use: Any) -> None:
    with pytest.raises(TypeError, match=r"not the whole config; pass its section, config\.model"):
        use(load_config("vanilla"))
    with pytest.raises(TypeError, match=r"not 'vanilla'; load it first: morex\.load_config"):
        use("vanilla")


def test_a_key_of_another_kind_is_sent_to_its_kinds() -> None:
    with pytest.raises(ConfigError, match=r"'model\.mixer\.depth': only model\.mixer\.kind 'recursive' has it$"):
        load_config("more-a", ["model.mixer.depth.kind=halting"])
    with pytest.raises(
        ConfigError, match=r"'model\.depth\.capacities': only .* 'expert_choice' or 'threshold' or 'random'"
    ):
        load_config("mor-token", ["model.depth.capacities=[1.0]"])


def test_a_shared_core_of_one_recursion_keeps_its_rule_for_more_at_call_time() -> None:
    assert load_config("recursive", ["model.schedule.recursions=1", "model.kv=refresh"]).model.kv == "refresh"
