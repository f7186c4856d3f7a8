"""Properties of configs: what validates builds, runs and is causal; what does not is refused in one sentence."""

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import morex
from morex.config import ModelConfig
from morex.depth.routers import ROUTERS
from morex.loading import ConfigError, load_config, validate

Tree = dict[str, Any]
VOCABULARY, LENGTH = 13, 7


def section(required: dict[str, st.SearchStrategy[Any]], optional: dict[str, st.SearchStrategy[Any]]) -> Any:
    return st.fixed_dictionaries(required, optional=optional)


def feed_forwards() -> Any:
    kinds = st.sampled_from(["swiglu", "geglu", "gelu", "relu"])
    return section({"kind": kinds, "d_ff": st.sampled_from([1, 4, 9])}, {})


def expert_routers() -> Any:
    """top_k may be more than the experts there are, which must be refused."""
    required = {"experts": st.sampled_from([4, 3, 2, 1]), "top_k": st.sampled_from([1, 1, 2, 3])}
    weights = st.sampled_from([0.0, 0.01])
    steps = st.sampled_from([0, 3])
    return section(
        required,
        {"balance_weight": weights, "z_weight": weights, "bias_rate": weights, "balance_warmup_steps": steps},
    )


def mixers() -> Any:
    moe = section({"kind": st.just("moe"), "router": expert_routers(), "expert": feed_forwards()}, {})
    recursive = section(
        {"kind": st.just("recursive"), "router": expert_routers(), "d_ff": st.sampled_from([2, 5])},
        {
            "steps": st.integers(1, 3),
            "attention_scope": st.sampled_from(["routed", "token"]),
            "branch": st.sampled_from(["change", "output"]),
            "keep_unused_qk": st.booleans(),
        },
    )
    steps, width = st.integers(1, 3), st.sampled_from([2, 5])
    huginn = section(
        {"kind": st.just("huginn"), "router": expert_routers()},
        {"steps": steps, "d_ff": width, "attention_scope": st.sampled_from(["routed", "token"])},
    )
    shared = section(
        {"kind": st.just("shared_recurrent"), "router": expert_routers()},
        {"steps": steps, "d_ff": width, "expert": feed_forwards(), "state_std": st.sampled_from([0.0, 0.5])},
    )
    layer = section(
        {"kind": st.just("layer_recurrent"), "router": expert_routers(), "expert": feed_forwards()},
        {
            "steps": steps,
            "scale": st.sampled_from([0.5, 1.0]),
            "ema": st.sampled_from([0.0, 0.9]),
            "entropy_floor": st.sampled_from([0.0, 0.8, 9.0]),
        },
    )
    return st.one_of(feed_forwards(), moe, recursive, huginn, shared, layer)


def schedules() -> Any:
    sharing = st.sampled_from(["none", "cycle", "sequence", "middle_cycle", "middle_sequence"])
    named = section({"sharing": sharing, "layers": st.integers(1, 8)}, {"recursions": st.integers(1, 3)})
    general = section(
        {
            "sharing": st.sampled_from(["cycle", "sequence"]),
            "core": st.integers(1, 2),
            "recursions": st.sampled_from([2, 3, 1]),
        },
        {"prelude": st.integers(0, 1), "coda": st.integers(0, 1)},
    )
    return st.one_of(named, general)


def depths() -> Any:
    capacities = st.lists(st.sampled_from([0.1, 1 / 3, 0.5, 1.0]), min_size=1, max_size=3)
    gated = {
        "capacities": capacities,
        "alpha": st.sampled_from([0.1, 1.0]),
        "gate": st.sampled_from(["output", "delta"]),
    }
    learned = gated | {
        "score": st.sampled_from(["sigmoid", "tanh", "unweighted"]),
        "router": st.sampled_from(["linear", "mlp"]),
        "z_weight": st.sampled_from([0.0, 0.01]),
    }
    expert_choice = learned | {
        "causal": st.sampled_from(["aux_loss", "aux_router", "none"]),
        "warmup_steps": st.sampled_from([0, 10]),
        "hierarchical": st.booleans(),
    }
    token_choice = {
        "score": st.sampled_from(["softmax", "sigmoid"]),
        "temperature": st.sampled_from([0.5, 2.0]),
        "gate": st.sampled_from(["last", "each"]),
        "balance": st.sampled_from(["loss", "loss_free", "none"]),
        "router": st.sampled_from(["linear", "mlp"]),
        "z_weight": st.sampled_from([0.0, 0.01]),
    }
    return st.one_of(
        section({"kind": st.just("fixed")}, {}),
        section({"kind": st.just("expert_choice")}, expert_choice),
        section({"kind": st.just("token_choice")}, token_choice),
        section({"kind": st.just("threshold")}, learned | {"momentum": st.sampled_from([0.0, 0.99])}),
        section(
            {"kind": st.just("halting")},
            {
                "epsilon": st.sampled_from([0.0, 0.01, 0.5]),
                "ponder_weight": st.sampled_from([0.0, 0.01]),
                "initial_bias": st.sampled_from([-2.0, 1.0]),
            },
        ),
        section(
            {"kind": st.just("exit_gate")},
            {"threshold": st.sampled_from([0.2, 0.5, 1.0]), "entropy_weight": st.sampled_from([0.0, 0.1])},
        ),
        section(
            {"kind": st.just("sampled")},
            {
                "spread": st.sampled_from([0.0, 0.5]),
                "curriculum_steps": st.sampled_from([0, 5]),
                "gradient_recursions": st.sampled_from([None, None, 1, 8]),
                "state": st.sampled_from(["input", "random"]),
            },
        ),
        section({"kind": st.just("random")}, gated | {"seed": st.integers(0, 5)}),
    )


def attentions() -> Any:
    """Windows come whole, mostly, so that not nearly everything is refused."""
    windows: list[Tree] = [{}, {}, {"window": 2}, {"window": 1, "global_every": 2}, {"global_every": 2}]
    windows += [{"window": 3, "global_every": 3, "local_rope_base": 5.0}, {"window": 4, "local_rope_base": 5.0}]
    return st.tuples(projections(), st.sampled_from(windows)).map(lambda parts: parts[0] | parts[1])


def projections() -> Any:
    return section(
        {"heads": st.sampled_from([2, 1, 4, 3])},
        {
            "kv_heads": st.sampled_from([1, 1, 2, 3]),
            "head_dim": st.sampled_from([2, 2, 6, 3]),
            "scale": st.sampled_from([0.1, 1.0]),
            "rope_base": st.sampled_from([10.0, 1e6]),
            "positions": st.sampled_from(["rope", "rope", "learned", "none"]),
            "rope_scaling": st.sampled_from([None, None, {"factor": 4.0, "original_max_seq_len": 16}]),
            "bias": st.booleans(),
            "output_bias": st.booleans(),
            "qk_norm": st.booleans(),
        },
    )


def heads() -> Any:
    """Mostly language models, of which more can be checked."""
    classifiers = [{"kind": "classifier", "pooling": pooling} for pooling in ("last", "mean")]
    return st.sampled_from([*[{"kind": "lm"}] * 3, *classifiers])


def models() -> Any:
    """Model sections, of which many do not fit together."""
    return section(
        {
            "vocab_size": st.just(VOCABULARY),
            "d_model": st.sampled_from([6, 8, 12]),
            "attention": attentions(),
            "mixer": mixers(),
            "schedule": schedules(),
            "depth": depths(),
            "kv": st.sampled_from(["per_recursion", "shared_first", "refresh"]),
        },
        {
            "tie_embeddings": st.booleans(),
            "head": heads(),
            "step_embedding": st.booleans(),
            "dropout": st.sampled_from([{}, {}, {"residual": 0.3}, {"attention": 0.2, "embedding": 0.1}]),
            "residual_scale": st.sampled_from(["none", "none", "recursions"]),
            "recursion_norms": st.sampled_from([False, False, True]),
            "lora": st.sampled_from([None, None, None, {"rank": 2}, {"rank": 1, "alpha": 3.0}]),
            "input_injection": st.sampled_from(["none", "none", "add", "concat"]),
            "init": st.sampled_from(["scaled", "plain"]),
            "norm": st.sampled_from(["rms", "rms", "rms_plus_one", "layer"]),
            "norm_placement": st.sampled_from(["pre", "sandwich", "pre_post"]),
            "embedding_scale": st.sampled_from([False, False, True]),
            "width_scaling": st.sampled_from([*[None] * 4, {"base_width": 3}, {"base_width": 64, "base_head_dim": 2}]),
            "logit_cap": st.sampled_from([None, 3.0]),
            "norm_eps": st.sampled_from([1e-6, 1e-2]),
        },
    )


def assert_one_sentence(message: str) -> None:
    assert message.strip() == message != ""
    assert "\n" not in message
    assert "pydantic" not in message
    assert "For further information" not in message
    assert 10 < len(message) < 400, message


def move(model: Any, distance: float, generator: torch.Generator) -> None:
    """Moves every parameter at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += distance * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def check_gradients(model: Any) -> None:
    """Every parameter has a finite gradient, but for the weights that are stored and never used.

    It may be zero here: with a handful of tokens an expert or a recursion may have no visitor.
    """
    mixer = model.config.mixer
    keeps_unused = mixer.kind == "recursive" and mixer.attention_scope == "token" and mixer.keep_unused_qk
    for name, parameter in model.named_parameters():
        if keeps_unused and re.search(r"\.mixer\.[qk]$", name):
            # A token that sees only itself needs no query and no key.
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert torch.isfinite(parameter.grad).all(), name


def check_model(config: ModelConfig) -> None:
    """Builds, runs forward and backward, and is causal in eval mode."""
    model: Any = morex.build_model(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    move(model, 0.3, generator)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH, 3])
    classifies = config.head.kind == "classifier"
    out = model.train()(tokens, labels=tokens[:, 0] % 4 if classifies else tokens, lengths=lengths)
    assert torch.isfinite(out.loss)
    out.loss.backward()
    check_gradients(model)
    # As an optimizer step would; else a threshold may be the very logit of a token, and rounding decides.
    move(model, 0.01, generator)
    model.update_routers(out.stats, 1)
    assert morex.count(config, seq_len=LENGTH).parameters == sum(p.numel() for p in model.parameters())

    model.eval()
    depth: Any = config.depth
    if depth.kind == "expert_choice" and depth.causal == "none":
        assert torch.isfinite(model(tokens, depth="oracle").logits).all()
        return
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % VOCABULARY
    with torch.no_grad():
        first, second = model(tokens).logits, model(changed).logits
        if classifies:
            ended = [model(row, lengths=torch.tensor([4, 4])).logits for row in (tokens, changed)]
            assert (ended[0] - ended[1]).abs().max() <= 1e-9
            return
        assert (first[:, :4] - second[:, :4]).abs().max() <= 1e-9
        cache = model.new_cache(2)
        parts = [model(tokens[:, :5], cache=cache).logits, model(tokens[:, 5:], cache=cache).logits]
        assert (torch.cat(parts, 1) - first).abs().max() <= 1e-9


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(models())
def test_what_validates_builds_runs_and_is_causal(tree: Tree) -> None:
    """And what does not validate says why."""
    note(str(tree))
    try:
        config = validate(ModelConfig, tree, "model")
    except ConfigError as refusal:
        assert_one_sentence(str(refusal))
        return
    check_model(config)


def test_the_strategy_finds_both_kinds() -> None:
    """The property above would be empty if nearly everything were refused, or nothing."""
    outcomes: list[tuple[bool, str]] = []

    @settings(max_examples=4000)
    @given(models())
    def collect(tree: Tree) -> None:
        try:
            outcomes.append((True, validate(ModelConfig, tree).depth.kind))
        except ConfigError:
            outcomes.append((False, ""))

    collect()
    accepted = [kind for valid, kind in outcomes if valid]
    assert 0.15 < len(accepted) / len(outcomes) < 0.95
    assert set(accepted) == set(ROUTERS)


def paths_of(tree: Tree, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all values."""
    found = []
    for key, value in tree.items():
        found += paths_of(value, (*prefix, key)) if isinstance(value, dict) else [(*prefix, key)]
    return found


def place(tree: Tree, path: tuple[str, ...]) -> Tree:
    for key in path[:-1]:
        tree = tree[key]
    return tree


@settings(max_examples=100)
@given(st.sampled_from(morex.presets()), st.data())
def test_unknown_keys_are_refused_with_the_nearest_one(preset: str, data: st.DataObject) -> None:
    """A letter too many in any key of any preset."""
    tree = copy.deepcopy(load_config(preset).to_dict())
    path = data.draw(st.sampled_from([path for path in paths_of(tree) if path[-1] != "kind"]))
    values = place(tree, path)
    del values[path[-1]]
    mistyped = path[-1] + "q"
    values[mistyped] = 1
    with pytest.raises(ConfigError) as refusal:
        validate(type(load_config(preset)), tree)
    assert_one_sentence(str(refusal.value))
    if path[-1] not in ("vocab_size", "d_model") or len(path) != 2:
        assert mistyped in str(refusal.value)
        assert f"'{path[-1]}'" in str(refusal.value)


@settings(max_examples=150)
@given(st.sampled_from(morex.presets()), st.data())
def test_senseless_values_are_refused_by_name(preset: str, data: st.DataObject) -> None:
    """Another type, or a number out of range: the sentence names the option."""
    tree = copy.deepcopy(load_config(preset).to_dict())
    path = data.draw(
        st.sampled_from(
            [path for path in paths_of(tree) if path[-1] not in ("corpus", "val_corpus", "column", "device")]
        )
    )
    value = data.draw(st.sampled_from([[1, 2], {"a": 1}, "nonsense", object()]))
    if path[-1] in ("path",) and isinstance(value, str):
        return
    place(tree, path)[path[-1]] = value
    with pytest.raises(ConfigError) as refusal:
        validate(type(load_config(preset)), tree)
    assert_one_sentence(str(refusal.value).replace(repr(value), "value"))
    assert path[-1] in str(refusal.value)


REFUSED: dict[str, tuple[list[str], str]] = {
    "an injection into no recursion": (
        ["model.schedule={sharing: none, layers: 4, recursions: 1}", "model.input_injection=add"],
        r"input_injection 'add' .*sharing 'none'",
    ),
    "a scale for one recursion": (
        ["model.schedule={sharing: none, layers: 4, recursions: 1}", "model.residual_scale=recursions"],
        r"residual_scale .*recursions is 1 .*'none'",
    ),
    "norms for one recursion": (
        ["model.schedule={sharing: cycle, layers: 2, recursions: 1}", "model.recursion_norms=true"],
        r"recursion_norms .*recursions is 1 .*'cycle'",
    ),
    "low-rank changes of one recursion": (
        ["model.schedule={sharing: none, layers: 4, recursions: 1}", "model.lora={}"],
        r"lora .*recursions is 1",
    ),
    "a vector for one recursion": (
        ["model.schedule={sharing: none, layers: 4, recursions: 1}", "model.step_embedding=true"],
        r"step_embedding .*recursions is 1 .*'none'",
    ),
    "keys of an earlier recursion where none is": (
        ["model.schedule={sharing: none, layers: 4, recursions: 1}", "model.kv=refresh"],
        r"kv 'refresh' .*recursions is 1 .*'none'",
    ),
    "keys of recursion 1 for a router of one recursion": (
        [
            "model.schedule={sharing: cycle, layers: 2, recursions: 1}",
            "model.depth.kind=random",
            "model.kv=shared_first",
        ],
        r"kv 'shared_first' .*recursions is 1 .*'cycle'",
    ),
    "low-rank changes of experts": (["model.mixer={kind: moe}", "model.lora={}"], r"lora .*mixer\.kind 'moe'"),
    "a rank that is not low": (["model.lora.rank=256"], r"lora\.rank 256 .*d_model 256.* 255"),
    "no rank": (["model.lora={rank: 0}"], r"lora\.rank"),
    "dropout of everything": (["model.dropout.residual=1.0"], r"model\.dropout\.residual .*1"),
    "dropout in experts' attention": (
        ["model.mixer={kind: recursive}", "model.dropout={attention: 0.1}"],
        r"dropout\.attention .*mixer\.kind 'recursive'",
    ),
    "one class": (["model.head={kind: classifier, classes: 1}"], r"model\.head\.classes .*2"),
    "a head of another kind": (["model.head={kind: regression}"], r"model\.head\.kind .*classifier"),
    "classes of a language model": (["model.head={classes: 3}"], r"model\.head"),
    "layers that do not divide": (
        ["model.schedule={sharing: cycle, layers: 8, recursions: 3}"],
        r"layers 8 .*6 and 9",
    ),
    "layers that do not divide in the middle": (
        ["model.schedule={sharing: middle_cycle, layers: 9, recursions: 3, core: null}"],
        r"layers 9 .*8 and 11",
    ),
    "too few layers": (["model.schedule={sharing: sequence, layers: 2, recursions: 3}"], r"layers 2 .*3"),
    "both ways to say the depth": (["model.schedule={layers: 8, core: 2}"], r"layers.*core"),
    "recursions without sharing": (["model.schedule={sharing: none, layers: 8, recursions: 3}"], r"none.*recursions"),
    "heads that do not divide": (["model.attention.heads=3", "model.attention.kv_heads=3"], r"d_model 256 .*heads 3"),
    "key heads that do not divide": (["model.attention.kv_heads=3"], r"kv_heads 3 .*heads 4"),
    "odd heads": (["model.attention.head_dim=7"], r"head_dim 7 .*even"),
    "more experts than there are": (
        ["model.mixer={kind: moe, router: {experts: 2, top_k: 3}}"],
        r"top_k 3 .*2 experts",
    ),
    "unknown mixer": (["model.mixer.kind=swigloo"], r"mixer.*swigloo.*swiglu"),
    "unknown router": (["model.depth.kind=expert"], r"depth.*expert.*expert_choice"),
    "capacities of another length": (
        ["model.depth={kind: expert_choice, capacities: [1.0, 0.5]}"],
        r"capacities .*2 .*recursions 3",
    ),
    "capacities that grow": (["model.depth={kind: threshold, capacities: [0.5, 0.6, 0.1]}"], r"capacities .*grow"),
    "no keys for all": (
        ["model.kv=shared_first", "model.depth={kind: random, capacities: [0.5, 0.4, 0.1]}"],
        r"shared_first.*capacities",
    ),
    "nothing to choose from": (
        ["model.schedule={sharing: none, layers: 4, recursions: 1}", "model.depth.kind=token_choice"],
        r"token_choice",
    ),
    "nothing to choose from in a loop of one": (
        ["model.schedule={sharing: cycle, layers: 2, recursions: 1}", "model.depth.kind=token_choice"],
        r"token_choice.*recursions is 1",
    ),
    "nothing to halt before": (
        ["model.schedule={sharing: cycle, layers: 2, recursions: 1}", "model.depth.kind=halting"],
        r"halting.*recursions is 1",
    ),
    "no keys of halted tokens": (
        ["model.depth.kind=halting"],
        r"halting.*per_recursion.*use kv 'refresh' or 'shared_first'",
    ),
    "no capacities": (["model.depth={kind: expert_choice, capacities: []}"], r"capacities .*0 entries .*recursions 3"),
    "a threshold router without a gradient": (
        ["model.depth={kind: threshold, score: unweighted}"],
        r"unweighted.*gradient.*sigmoid or tanh",
    ),
    "an expert-choice router without a gradient": (
        ["model.depth={kind: expert_choice, score: unweighted, causal: aux_router}"],
        r"unweighted.*gradient.*aux_loss",
    ),
    "scaling of what does not turn": (
        ["model.attention={heads: 4, positions: learned, rope_scaling: {factor: 2}}"],
        r"rope_scaling .*'learned'.*'rope'",
    ),
    "scaling out of order": (
        ["model.attention.rope_scaling={low_freq_factor: 4, high_freq_factor: 2}"],
        r"low_freq_factor 4.0 .*high_freq_factor 2.0",
    ),
    "scaling of an unknown kind": (["model.attention.rope_scaling.kind=yarn"], r"rope_scaling.kind 'yarn'.*llama3"),
    "other norms around recursive experts": (
        ["model.mixer={kind: recursive}", "model.norm=layer"],
        r"norm 'layer' .*recursive.*'rms'",
    ),
    "local steps without a window": (["model.attention.global_every=3"], r"global_every .*give window"),
    "a local base without a window": (["model.attention.local_rope_base=3"], r"local_rope_base .*give window"),
    "a local base of what does not turn": (
        ["model.attention={heads: 4, window: 3, local_rope_base: 3, positions: none}"],
        r"local_rope_base .*'none'.*'rope'",
    ),
    "global steps alone": (["model.attention={heads: 4, window: 3, global_every: 1}"], r"global_every 1 .*2"),
    "keys that are turned in two ways": (
        ["model.attention={heads: 4, window: 3, global_every: 3, local_rope_base: 9}", "model.kv=shared_first"],
        r"shared_first.*local_rope_base.*per_recursion",
    ),
    "turned keys of the latest visit": (
        ["model.attention={heads: 4, window: 3, global_every: 3, local_rope_base: 9}", "model.kv=refresh"],
        r"refresh.*local_rope_base.*per_recursion",
    ),
    "biases in recursive experts": (
        ["model.mixer={kind: recursive}", "model.attention.bias=true"],
        r"attention.bias .*recursive.*another mixer",
    ),
    "unused weights that are used": (
        ["model.mixer={kind: recursive, attention_scope: routed, keep_unused_qk: true}"],
        r"keep_unused_qk.*'token'",
    ),
    "sequences that are too long": (["train.seq_len=5000"], r"train.seq_len 5000 .*max_seq_len 1024"),
    "a width that heads do not divide": (["model.d_model=63"], r"d_model 63 .*heads 4; use 56 or 64"),
    "keys that heads do not share": (["model.attention={heads: 4, kv_heads: 3}"], r"kv_heads 3 .*use 1, 2 or 4"),
    "microbatches of unequal size": (
        ["train.batch_size=6", "train.accumulation=4"],
        r"accumulation 4 .*use 1, 2, 3 or 6",
    ),
    "a key named like a kind": (["fixed=3"], r"unknown key 'fixed'; known: data, eval, model, train"),
    "a section named like a kind": (["model.moe.experts=4"], r"unknown key 'model.moe'"),
    "a variant as a key": (["model.mixer.recursive.steps=3"], r"unknown key 'model.mixer.recursive'"),
    "a kind in place of a section": (["data.tokenizer=byte"], r"data.tokenizer 'byte' .*data.tokenizer.kind"),
    "one number in place of a list": (["model.depth={kind: threshold, capacities: 0.5}"], r"a list, such as \[0.5\]"),
    "too few numbers": (["train.betas=[0.9]"], r"train.betas.*number 2 is missing"),
    "a seed that is too large": (["train.seed=99999999999999999999"], r"train.seed 99999999999999999999 .*less than"),
    "negative width": (["model.d_model=-8"], r"d_model.*-8"),
    "no vocabulary": (["model.vocab_size=0"], r"vocab_size.*0"),
    "not a number": (["model.norm_eps=.nan"], r"norm_eps"),
    "infinite": (["model.attention.scale=.inf"], r"scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_option_and_what_works(name: str) -> None:
    overrides, pattern = REFUSED[name]
    with pytest.raises(ConfigError, match=pattern) as refusal:
        load_config("recursive", overrides)
    assert_one_sentence(str(refusal.value))


@pytest.mark.parametrize("preset", morex.presets())
def test_presets_survive_a_round_trip(preset: str) -> None:
    """A resolved config, written out and read back, is the same config; so is the tiny form."""
    for tiny in (False, True):
        config = load_config(preset, tiny=tiny)
        assert validate(type(config), config.to_dict()) == config


@pytest.mark.parametrize("preset", morex.presets())
def test_tiny_forms_keep_the_kinds(preset: str) -> None:
    full, tiny = load_config(preset).model, load_config(preset, tiny=True).model
    assert (tiny.d_model, tiny.vocab_size) == (32, 97)
    assert (tiny.mixer.kind, tiny.depth, tiny.kv) == (full.mixer.kind, full.depth, full.kv)
    assert tiny.schedule.recursions == full.schedule.recursions
    assert tiny.schedule.resolved.order == full.schedule.resolved.order
