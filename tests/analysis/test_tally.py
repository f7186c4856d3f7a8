"""Each quantity against the same quantity written out token by token."""

import math
import pickle
import statistics

import numpy as np
import pytest

from analysis.helpers import GROUP, LAYER, expert_trace, routed, tiny
from morex.analysis.records import Missing, Spread
from morex.analysis.scores import distribution_entropy
from morex.analysis.tally import AgreementTally, Moments, Tally
from morex.analysis.trace import Decisions, Moves
from morex.analysis.vocabulary import CLASSES, RARITIES

# Two rows of four and three tokens; the fourth column of row two is padding.
LENGTHS = [4, 3]
ACTIVE = np.array(
    [
        [[1, 1, 1, 1], [1, 1, 1, 0]],
        [[1, 0, 1, 0], [1, 1, 0, 0]],
        [[0, 0, 1, 0], [1, 0, 0, 0]],
    ],
    bool,
)
TOKENS = [(b, t) for b in range(2) for t in range(LENGTHS[b])]


def tallied(*batches: Decisions) -> Tally:
    tally = Tally(batches[0].config)
    for batch in batches:
        tally.add(batch)
    return tally


def entropy_of(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def assert_spread(found: Spread | Missing, values: list[float]) -> None:
    assert isinstance(found, Spread), found
    assert found.count == len(values)
    assert found.mean == pytest.approx(statistics.fmean(values), rel=1e-6)
    assert found.std == pytest.approx(statistics.pstdev(values), rel=1e-6, abs=1e-9)


def gate_scores() -> np.ndarray:
    """Logits of the candidates: those who were active before; NaN elsewhere."""
    scores = np.random.default_rng(1).normal(size=ACTIVE.shape)
    candidates = np.concatenate([ACTIVE[:1], ACTIVE[:-1]])
    return np.where(candidates, scores, np.nan)


def test_gated_router() -> None:
    config, scores = tiny("mor-expert").model, gate_scores()
    group = tallied(routed(config, ACTIVE, scores, LENGTHS)).groups[GROUP].report()
    assert group.active_share == pytest.approx((7 / 7, 4 / 7, 2 / 7))
    taken = [int(ACTIVE[:, b, t].sum()) for b, t in TOKENS]
    assert group.depths == pytest.approx([taken.count(level) / 7 for level in range(4)])
    assert group.wanted_share == pytest.approx((1, 2 / 3, 1 / 3))
    assert group.entropy_limit == pytest.approx(math.log(2))
    for r in range(3):
        asked = [(b, t) for b, t in TOKENS if not math.isnan(scores[r, b, t])]
        p = [sigmoid(scores[r, b, t]) for b, t in asked]
        assert_spread(group.entropy[r], [entropy_of([q, 1 - q]) for q in p])
        assert_spread(group.gate[r], [0.1 * sigmoid(scores[r, b, t]) for b, t in TOKENS if ACTIVE[r, b, t]])


def test_gates_follow_the_config() -> None:
    scores = gate_scores()
    config = tiny("mor-expert", "model.depth.score=tanh", "model.depth.alpha=0.5").model
    group = tallied(routed(config, ACTIVE, scores, LENGTHS)).groups[GROUP].report()
    assert_spread(group.gate[1], [0.5 * math.tanh(scores[1, b, t]) for b, t in TOKENS if ACTIVE[1, b, t]])
    config = tiny("mor-expert", "model.depth.score=unweighted").model
    group = tallied(routed(config, ACTIVE, scores, LENGTHS)).groups[GROUP].report()
    assert_spread(group.gate[1], [1.0] * 4)
    # Recursion 1 takes everybody and has no gate: its scores are zeros that nobody computed.
    assert isinstance(group.entropy[0], Missing) and "has no score" in group.entropy[0].missing
    assert isinstance(group.entropy[1], Spread)


def test_choice_of_depth() -> None:
    config = tiny("mor-token").model
    p = np.random.default_rng(2).dirichlet([1, 1, 1], size=(2, 4)).transpose(2, 0, 1)
    group = tallied(routed(config, ACTIVE, p, LENGTHS)).groups[GROUP].report()
    assert len(group.entropy) == 1 and group.entropy_limit == pytest.approx(math.log(3))
    assert_spread(group.entropy[0], [entropy_of(p[:, b, t].tolist()) for b, t in TOKENS])
    depth = ACTIVE.sum(0)
    for r in range(3):
        assert_spread(group.gate[r], [p[r, b, t] for b, t in TOKENS if depth[b, t] == r + 1])


def test_halting() -> None:
    config = tiny("mor-act").model
    p = np.array([[0.3] * 4, [0.5] * 4, [np.nan] * 4])[:, None, :].repeat(2, 1)
    p = np.where(ACTIVE, p, np.nan)
    group = tallied(routed(config, ACTIVE, p, LENGTHS)).groups[GROUP].report()
    assert_spread(group.entropy[0], [entropy_of([0.3, 0.7])] * 7)
    assert_spread(group.entropy[1], [entropy_of([0.5, 0.5])] * 4)
    assert isinstance(group.entropy[2], Missing) and "is not asked" in group.entropy[2].missing
    # A token that goes on weighs p, one that halts what is left: the weights of a token sum to 1.
    depth = ACTIVE.sum(0)
    weights = {1: [1.0], 2: [0.3, 0.7], 3: [0.3, 0.5, 0.2]}
    for r in range(3):
        assert_spread(group.gate[r], [weights[depth[b, t]][r] for b, t in TOKENS if depth[b, t] > r])


def test_routers_without_scores_say_so() -> None:
    for preset, why in (("mor-random", "scores nothing"), ("recursive", "no router decides depth")):
        group = tallied(routed(tiny(preset).model, ACTIVE, None, LENGTHS)).groups[GROUP].report()
        assert isinstance(group.entropy, Missing) and why in group.entropy.missing
        assert isinstance(group.gate, Missing)


def test_changes_of_the_state() -> None:
    generator = np.random.default_rng(3)
    states = generator.normal(size=(4, 2, 4, 5))
    start = np.linalg.norm(states[:-1], axis=-1)
    moved = np.linalg.norm(states[1:] - states[:-1], axis=-1)
    cosine = (states[1:] * states[:-1]).sum(-1) / (start * np.linalg.norm(states[1:], axis=-1))
    batch = routed(tiny("recursive").model, ACTIVE, None, LENGTHS, moves=Moves(start, moved, cosine))
    group = tallied(batch).groups[GROUP].report()
    for r in range(3):
        active = [(b, t) for b, t in TOKENS if ACTIVE[r, b, t]]
        assert_spread(group.change[r], [moved[r, b, t] / start[r, b, t] for b, t in active])
        assert_spread(group.cosine[r], [cosine[r, b, t] for b, t in active])
    deepest = [(b, t) for b, t in TOKENS if ACTIVE[:, b, t].all()]
    assert_spread(group.last_share, [moved[2, b, t] / moved[:, b, t].sum() for b, t in deepest])


def test_a_recursion_that_nobody_takes_has_no_value() -> None:
    active = ACTIVE.copy()
    active[2] = False
    group = tallied(routed(tiny("mor-random").model, active, None, LENGTHS)).groups[GROUP].report()
    assert group.active_share[2] == 0
    assert group.change[2] == Missing("no token takes this recursion")
    assert group.last_share == Missing("no token takes every recursion")


def test_depths_by_class() -> None:
    kinds = np.array([[0, 0, 1, 3], [3, 2, 0, 5]], np.uint8)
    rarities = np.array([[0, 1, 2, 0], [0, 1, 2, 0]], np.uint8)
    batch = routed(tiny("mor-random").model, ACTIVE, None, LENGTHS, token_class=kinds, token_rarity=rarities)
    report = tallied(batch, batch).depth_report(True)
    depth = ACTIVE.sum(0)
    assert not isinstance(report, Missing)
    assert report.histogram == tuple(2 * sum(depth[b, t] == d for b, t in TOKENS) for d in range(4))
    assert report.mean == pytest.approx(statistics.fmean(depth[b, t] for b, t in TOKENS))
    for names, ids, found in ((CLASSES, kinds, report.by_class), (RARITIES, rarities, report.by_rarity)):
        assert not isinstance(found, Missing)
        assert set(found) == {names[ids[b, t]] for b, t in TOKENS}
        for name, entry in found.items():
            own = [int(depth[b, t]) for b, t in TOKENS if names[ids[b, t]] == name]
            assert entry.tokens == 2 * len(own) and entry.mean == pytest.approx(statistics.fmean(own))
            assert entry.shares == pytest.approx([own.count(d) / len(own) for d in range(4)])


def test_depths_without_texts_or_router() -> None:
    tally = tallied(routed(tiny("mor-random").model, ACTIVE, None, LENGTHS))
    report = tally.depth_report(True)
    assert not isinstance(report, Missing) and isinstance(report.by_class, Missing)
    assert isinstance(tally.depth_report(False), Missing)


@pytest.mark.parametrize("top_k", [1, 2])
def test_expert_layer(top_k: int) -> None:
    logits = np.random.default_rng(4).normal(size=(2, 5, 4)).astype(np.float32)
    (call,) = tallied(expert_trace(logits, top_k)).layers[LAYER].report().calls
    counts, entropies, largest, weights = [0] * 4, [], [], []
    for row in logits.reshape(-1, 4).tolist():
        total = sum(math.exp(x) for x in row)
        p = [math.exp(x) / total for x in row]
        chosen = sorted(range(4), key=lambda e: -row[e])[:top_k]
        for e in chosen:
            counts[e] += 1
        entropies.append(entropy_of(p))
        largest.append(max(p))
        weights.append(max(p) if top_k == 1 else max(p) / sum(p[e] for e in chosen))
    assert call.load == pytest.approx([count / (10 * top_k) for count in counts])
    assert_spread(call.entropy, entropies)
    assert_spread(call.confidence, largest)
    assert_spread(call.weight, weights)
    assert call.own_entropy == call.entropy


def test_memory_does_not_grow() -> None:
    """A tally after many batches holds as much as after one."""
    batch = expert_trace(np.random.default_rng(4).normal(size=(2, 5, 4)))

    def held(batches: int) -> int:
        tally = tallied(*[batch] * batches)
        assert tally.tokens == 10 * batches
        return len(pickle.dumps((tally.histogram, tally.by_class, tally.groups, tally.layers)))

    assert held(50) <= held(1) + 200  # larger counts have more digits


def test_agreement_of_two_rules() -> None:
    config = tiny("mor-expert").model
    other = np.random.default_rng(5).random(ACTIVE.shape) < 0.5
    agreement = AgreementTally()
    agreement.add(routed(config, ACTIVE, None, LENGTHS), routed(config, other, None, LENGTHS))
    for r, entry in enumerate(agreement.report(GROUP)):
        pairs = [(bool(ACTIVE[r, b, t]), bool(other[r, b, t])) for b, t in TOKENS]
        assert entry.accuracy == pytest.approx(sum(a == b for a, b in pairs) / 7)
        ours, theirs = [b for a, b in pairs if a], [a for a, b in pairs if b]
        assert entry.precision == pytest.approx(sum(ours) / len(ours))
        assert entry.recall == pytest.approx(sum(theirs) / len(theirs))


def test_a_rule_that_takes_nobody_has_no_precision() -> None:
    config, agreement = tiny("mor-expert").model, AgreementTally()
    agreement.add(routed(config, 0 * ACTIVE > 0, None, LENGTHS), routed(config, ACTIVE, None, LENGTHS))
    entry = agreement.report(GROUP)[0]
    assert isinstance(entry.precision, Missing) and entry.recall == 0 and entry.accuracy == 0


def test_entropy_of_saturated_routers_is_a_number() -> None:
    logits = np.array([[1e30, 0, 0], [np.inf, 0, 5], [-np.inf, -np.inf, 1], [np.inf, np.inf, 0], [2, 2, 2]])
    p, entropy = distribution_entropy(logits)
    assert entropy == pytest.approx([0, 0, 0, math.log(2), math.log(3)])
    assert p.sum(-1) == pytest.approx(np.ones(5))


def test_a_router_that_is_not_finite_has_no_entropy() -> None:
    logits = np.zeros((1, 3, 4))
    logits[0, 1] = np.nan
    (call,) = tallied(expert_trace(logits)).layers[LAYER].report().calls
    assert call.entropy == Missing("a value is not finite")


def test_moments_join_as_if_whole() -> None:
    values = np.random.default_rng(6).normal(1e6, 1.0, 1000)
    moments = Moments()
    for part in np.split(values, [0, 1, 7, 400]):
        moments.add(part)
    assert_spread(moments.spread(""), values.tolist())
    assert Moments().spread("nobody") == Missing("nobody")
