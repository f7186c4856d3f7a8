"""The nine kinds of fault that five earlier programs of this sort had, each looked for in every preset.

Each kind has a test, and beside it tests that plant the fault, as it was, in a model of ours and see that it is found.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import morex
from morex.cache.batch import KVCache
from morex.depth.expert_choice import ExpertChoiceRouter
from morex.depth.gated import LearnedGateRouter
from morex.experts import huginn, shared_recurrent
from morex.experts.router import ExpertRouter
from morex.model.stack import Core
from morex.nn import attention
from morex.nn.keys import Keys
from morex.nn.packing import Packing
from parity.detectors import (
    batch_dependence,
    fault_of_checkpoint,
    future_leak,
    growth,
    not_finite,
    spread_of_evaluation,
    unread_cache,
    void_entropies,
)
from parity.helpers import (
    LM_CASES,
    PRESETS,
    build,
    config_of,
    eval_model,
    fresh_model,
    pad,
    plain_path,
    ragged_rows,
    random_tokens,
)
from parity.test_alive import dead_parameters

SHAPES = [(2, 16), (3, 7), (1, 12)]
"""Batches of changing size and length, as a training has them at its end at the latest."""
TOLERANCE = 1e-9
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("preset", PRESETS)
def test_future_leaks(preset: str) -> None:
    """Four programs let a token see later ones, also when they were evaluated.

    One handed attention a mask of opposite meaning, so that tokens saw the later positions only; two chose tokens by
    their rank in the whole sequence, or the whole batch; and in one the random states of experts were dealt out by
    rows of their batch, which later tokens move. Training losses looked better for it.
    """
    assert future_leak(eval_model(preset), random_tokens(preset)) <= TOLERANCE


def test_future_leaks_are_found_in_a_mask_of_opposite_meaning(monkeypatch: Patch) -> None:
    plain = attention._sdpa

    def opposite(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
        earlier = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        allowed = ~(earlier if mask is None else mask).expand(q.shape[0], -1, -1).clone()
        allowed[:, -1] = True  # a row without any key would be NaN
        return plain(q, k, v, allowed, scale, dropout)

    monkeypatch.setattr(attention, "_sdpa", opposite)
    with plain_path():
        assert future_leak(eval_model("vanilla"), random_tokens("vanilla")) > 1e-3


def test_future_leaks_are_found_in_the_rank_within_a_sequence() -> None:
    model, tokens = eval_model("mor-expert"), random_tokens("mor-expert")
    assert future_leak(model, tokens, depth="oracle", places=(3, 7, 11)) > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_dead_parameters(preset: str) -> None:
    """Four programs had weights that nothing trained, and counted them.

    Routers compared scores with a threshold and dropped the gradient, or had the weight of their one expert
    renormalised to 1; queries and keys of experts met one token at a time; and more blocks were built than the depth
    used, seven tenths of all parameters in one configuration.
    """
    assert not dead_parameters(preset)


def test_dead_parameters_are_found_where_a_router_only_compares(monkeypatch: Patch) -> None:
    own = LearnedGateRouter.gates
    monkeypatch.setattr(LearnedGateRouter, "gates", lambda *arguments: own(*arguments).detach())
    dead = dead_parameters("mor-expert")
    assert dead and all(".groups." in name and ".router.score." in name for name in dead)


def test_dead_parameters_are_found_where_one_expert_weighs_one(monkeypatch: Patch) -> None:
    own = ExpertRouter.route

    def renormalised(router: ExpertRouter, logits: Tensor, *rest: Any) -> Any:
        chosen, weights, signals = own(router, logits, *rest)
        return chosen, weights / weights.sum(-1, keepdim=True), signals

    monkeypatch.setattr(ExpertRouter, "route", renormalised)
    assert config_of("moe").mixer.router.top_k == 1
    dead = dead_parameters("moe")
    assert dead and all(name.endswith("mixer.router.weight") for name in dead)


def test_dead_parameters_are_found_in_a_block_that_never_runs(monkeypatch: Patch) -> None:
    own = Core.__init__

    def with_a_spare(core: Core, blocks: list[Any], *arguments: Any) -> None:
        own(core, [*blocks, copy.deepcopy(blocks[0])], *arguments)

    monkeypatch.setattr(Core, "__init__", with_a_spare)
    spare = f"stack.core.blocks.{config_of('recursive').schedule.resolved.core}."
    dead = dead_parameters("recursive")
    assert dead and all(name.startswith(spare) for name in dead)


@pytest.mark.parametrize("preset", PRESETS)
def test_random_evaluation(preset: str) -> None:
    """Two expert models drew their first latent state in evaluation too.

    Two passes over one text were up to 2.0 apart in their logits, and greedy decoding was not reproducible.
    """
    model = build(morex.load_config(preset, tiny=True).model).eval()
    assert spread_of_evaluation(model, random_tokens(preset)) == 0


@pytest.mark.parametrize("preset", ["more-a", "more-b"])
def test_random_evaluation_is_found_in_a_drawn_state(monkeypatch: Patch, preset: str) -> None:
    def drawn(x: Tensor, packing: Packing, std: float, training: bool) -> Tensor:
        return torch.randn_like(x) * std

    for module in (huginn, shared_recurrent):
        monkeypatch.setattr(module, "initial_state", drawn)
    model = build(morex.load_config(preset, tiny=True).model).eval()
    assert spread_of_evaluation(model, random_tokens(preset)) > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_void_entropies(preset: str) -> None:
    """Two programs reported an entropy of their routers that said nothing.

    One took the softmax over the single score of a router, which is 0 whatever the router does, and its comparison of
    two routers rested on it; one was NaN for a saturated router, and NaN < 0.8 never lifted it.
    """
    assert not void_entropies(fresh_model(preset), random_tokens(preset))


def report_entropy(monkeypatch: Patch, of: Any) -> None:
    """Lets expert routers report the sum of `of(probabilities)` as their entropy."""
    own = ExpertRouter._report

    def reported(router: ExpertRouter, total: Tensor, logs: Tensor, probabilities: Tensor, chosen: Tensor) -> Any:
        signals = own(router, total, logs, probabilities, chosen)
        signals.stats["entropy"] = of(probabilities.detach()).sum()
        return signals

    monkeypatch.setattr(ExpertRouter, "_report", reported)


def test_void_entropies_are_found_over_a_single_score(monkeypatch: Patch) -> None:
    report_entropy(monkeypatch, lambda p: torch.special.entr(p.amax(-1, keepdim=True).softmax(-1)))
    assert void_entropies(fresh_model("more-tuned"), random_tokens("more-tuned"))


def test_void_entropies_are_found_where_zero_times_infinity_is_summed(monkeypatch: Patch) -> None:
    report_entropy(monkeypatch, lambda p: -p * p.log())
    assert void_entropies(fresh_model("more-tuned"), random_tokens("more-tuned"))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("preset", PRESETS)
def test_batch_dependence(preset: str, training: bool) -> None:
    """One program chose the tokens above a quantile of the flattened batch, neighbours included.

    A row's logits moved by 0.4 with them; a prefix gave other logits than the whole, so no cache could have agreed;
    and a single token ended the program, as no quantile could be taken.
    """
    model = fresh_model(preset).train(training)
    assert batch_dependence(model, ragged_rows(preset, [16, 9, 5, 1])) <= TOLERANCE


def test_batch_dependence_is_found_in_a_rank_within_the_batch(monkeypatch: Patch) -> None:
    def over_the_batch(
        router: Any, logits: Tensor, candidates: Tensor, h: Tensor, routing: Any, r: int
    ) -> Tensor | None:
        wanted = max(1, int(router.capacities[r - 1] * len(logits)))
        scores = logits.detach().masked_fill(~candidates, -torch.inf)
        return candidates & (scores >= scores.topk(wanted).values[-1])

    monkeypatch.setattr(ExpertChoiceRouter, "choose", over_the_batch)
    assert batch_dependence(eval_model("mor-expert"), ragged_rows("mor-expert", [16, 9, 5])) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preset", PRESETS)
def test_nan_at_saturation(preset: str, dtype: torch.dtype) -> None:
    """Two programs had NaN where a router was sure of itself.

    The logarithm of a probability that had vanished was multiplied with it; and the rows of tokens that had halted
    were masked entirely, so that their softmax had nothing to be taken over.
    """
    model = build(config_of(preset), dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.mul_(1e4)
    tokens, lengths = pad(ragged_rows(preset, [16, 4]))
    assert not not_finite(model, tokens, lengths)


def test_nan_at_saturation_is_found_in_the_logarithm_of_what_vanished(monkeypatch: Patch) -> None:
    report_entropy(monkeypatch, lambda p: -p * p.log())
    model = build(config_of("more-tuned"))
    assert not not_finite(model, random_tokens("more-tuned"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.mul_(1e4)
    assert set(not_finite(model, random_tokens("more-tuned"))) == {"statistics"}


def test_nan_at_saturation_is_found_in_a_row_that_is_masked_entirely(monkeypatch: Patch) -> None:
    plain = attention._sdpa

    def halted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
        earlier = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        allowed = (earlier if mask is None else mask).expand(q.shape[0], -1, -1).clone()
        allowed[:, -1] = False
        scores = (q.transpose(1, 2) @ k.repeat_interleave(q.shape[2] // k.shape[2], 2).permute(0, 2, 3, 1)) * scale
        weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        return plain(q, k, v, mask, scale, dropout) + 0 * weights.sum()

    monkeypatch.setattr(attention, "_sdpa", halted)
    with plain_path():
        assert "loss" in not_finite(build(config_of("mor-act")), random_tokens("mor-act"))


@pytest.mark.parametrize("preset", PRESETS)
def test_graph_growth(preset: str) -> None:
    """One program kept a running mean of its router's logits with its autograd graph.

    Each step added 125 nodes and 0.22 MB, without end; and the mean took the shape of the first batch, so that a batch
    of another size or length ended the training.
    """
    assert not growth(fresh_model(preset), SHAPES)


def test_graph_growth_is_found_in_a_running_mean(monkeypatch: Patch) -> None:
    own = ExpertRouter.route

    def averaged(router: ExpertRouter, logits: Tensor, *rest: Any) -> Any:
        router.mean = 0.9 * getattr(router, "mean", 0.0) + 0.1 * logits.mean(0)
        return own(router, logits, *rest)

    monkeypatch.setattr(ExpertRouter, "route", averaged)
    assert growth(fresh_model("more-tuned"), SHAPES) == ["graphs kept on modules"]


def test_graph_growth_is_found_in_a_history(monkeypatch: Patch) -> None:
    own = ExpertRouter.route

    def remembered(router: ExpertRouter, logits: Tensor, *rest: Any) -> Any:
        router.past = torch.cat((getattr(router, "past", logits[:0]), logits)).detach()
        return own(router, logits, *rest)

    monkeypatch.setattr(ExpertRouter, "route", remembered)
    assert growth(fresh_model("more-tuned"), SHAPES) == ["tensors kept on modules"]


@pytest.mark.parametrize("preset", PRESETS)
def test_unloadable_checkpoints(preset: str, tmp_path: Path) -> None:
    """One program's buffer changed its shape in training, and no new model could take the saved weights in."""
    assert fault_of_checkpoint(fresh_model(preset), SHAPES, tmp_path) is None


def test_unloadable_checkpoints_are_found_where_a_buffer_has_grown(monkeypatch: Patch, tmp_path: Path) -> None:
    own = ExpertRouter.update

    def broadcast(router: ExpertRouter, stats: dict[str, Tensor], step: int) -> None:
        own(router, stats, step)
        router.bias = router.bias + router.bias.new_zeros(int(stats["tokens"]), 1)

    monkeypatch.setattr(ExpertRouter, "update", broadcast)
    fault = fault_of_checkpoint(fresh_model("more-tuned"), SHAPES[:1], tmp_path)
    assert fault is not None and "size mismatch" in fault


def test_unloadable_checkpoints_are_found_where_state_is_not_saved(monkeypatch: Patch, tmp_path: Path) -> None:
    def unsaved(router: Any, stats: dict[str, Tensor], step: int) -> None:
        router.alpha = 2 * router.alpha

    monkeypatch.setattr(ExpertChoiceRouter, "update", unsaved)
    fault = fault_of_checkpoint(fresh_model("mor-expert"), SHAPES[:1], tmp_path)
    assert fault == "the loaded model has other logits"


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset in LM_CASES])
def test_caches_never_read(preset: str) -> None:
    """Two programs filled a cache that nothing read.

    One wrote the whole sequence to it again for each new token until it was full, and gave the same logits with it as
    without, at the same cost; the other read the place behind the last one written, which was still zero.
    """
    assert not unread_cache(eval_model(preset), random_tokens(preset))


def test_caches_never_read_are_found(monkeypatch: Patch) -> None:
    own = KVCache.append
    monkeypatch.setattr(KVCache, "append", lambda *arguments: bool(own(*arguments)) or True)
    faults = unread_cache(eval_model("vanilla"), random_tokens("vanilla"))
    assert "another past changes nothing" in faults
    assert sum(fault.endswith("is not read") for fault in faults) == config_of("vanilla").schedule.resolved.num_blocks


def test_caches_never_read_are_found_where_only_zeros_are(monkeypatch: Patch) -> None:
    own = KVCache.read

    def empty(cache: KVCache, slot: Any) -> Keys:
        keys = own(cache, slot)
        return Keys(torch.zeros_like(keys.k), torch.zeros_like(keys.v), keys.time)

    monkeypatch.setattr(KVCache, "view", empty)
    assert unread_cache(eval_model("vanilla"), random_tokens("vanilla")) == ["another past changes nothing"]


def test_caches_never_read_are_found_where_everything_is_written_again(monkeypatch: Patch) -> None:
    model, tokens = eval_model("vanilla"), random_tokens("vanilla")
    forward = type(model).forward

    def whole(self: Any, given: Tensor, cache: Any = None, **options: Any) -> Any:
        return forward(self, tokens if cache is not None and given.shape[1] == 1 else given, cache=cache, **options)

    monkeypatch.setattr(type(model), "forward", whole)
    assert any("entries" in fault for fault in unread_cache(model, tokens))
