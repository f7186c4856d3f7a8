"""Invariant 3: decoding with a cache is the full forward, for every KV rule, router and way to cut the sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import morex
from morex.model.lm import Trace
from morex.model.sampling import Sampling, sample
from parity.helpers import (
    LM_CASES,
    PRESETS,
    REPEATABLE,
    cases,
    config_of,
    eval_model,
    fresh_model,
    largest_change,
    load,
    pad,
    ragged_rows,
    random_tokens,
)

DEPTHS: list[int | str] = ["uniform:2", "adaptive:8", "progressive:12", 1]
RECURRENT = [case for case in LM_CASES if config_of(case).schedule.recursions > 1]
# Constant and growing depths in every case, the others of both kinds in every preset.
CASE_DEPTHS = [(case, depth) for case in RECURRENT for depth in (DEPTHS if case in PRESETS else DEPTHS[:2])]
DEPTH_ROUTED = cases("expert_choice", "token_choice", "threshold", "halting", "exit_gate", "random", head="lm")
ROUTED = sorted({*DEPTH_ROUTED, *cases(mixer="moe", head="lm"), *cases(mixer="recursive", head="lm")})
CHUNKS: dict[str, list[list[int]]] = {
    "ones": [[1] * 8] * 2,
    "chunks": [[5, 1, 3, 1, 4]] * 2,
    "ragged": [[6, 1, 1, 3], [2, 1, 1, 1], [4, 1, 1, 2]],
}

# What one token did: the recursions it took, by routed group, and the experts of each of its visits, by expert layer.
Route = dict[str, list[Any]]


@dataclass
class Row:
    """What a model made of one sequence."""

    logits: torch.Tensor
    """[T, V]."""
    routes: list[Route]
    """Of each token."""


def routes_of(trace: Trace, row: int, length: int) -> list[Route]:
    """Routes of the first `length` tokens of a row.

    A call of an expert layer that a token did not take part in leaves no entry, and a recursion that nobody takes has
    no call: what a token visits is said by the depth router, what it chooses there, in order, by the expert router.
    """
    routes: list[Route] = []
    for t in range(length):
        route: Route = {name: [bool(mask[row, t]) for mask in masks] for name, masks in trace.active.items()}
        for name, calls in trace.experts.items():
            chosen = [call[row, t].tolist() for call in calls]
            route[name] = [ids for ids in chosen if ids[0] >= 0]
        routes.append(route)
    return routes


def full_pass(model: Any, row: torch.Tensor, depth: int | str | None) -> Row:
    out = model(row[None], depth=depth, return_trace=True)
    return Row(out.logits[0], routes_of(out.trace, 0, len(row)))


def cached_pass(
    model: Any, rows: Sequence[torch.Tensor], chunks: list[list[int]], depth: int | str | None
) -> list[Row]:
    """Each row, fed in chunks through one cache."""
    cache = model.new_cache(len(rows))
    done = [0] * len(rows)
    pieces: list[list[torch.Tensor]] = [[] for _ in rows]
    routes: list[list[Route]] = [[] for _ in rows]
    for sizes in zip(*chunks, strict=True):
        parts = [row[start : start + size] for row, start, size in zip(rows, done, sizes, strict=True)]
        tokens, lengths = pad(parts)
        ragged = len(set(sizes)) > 1
        out = model(tokens, cache=cache, lengths=lengths if ragged else None, depth=depth, return_trace=True)
        for index, size in enumerate(sizes):
            pieces[index].append(out.logits[index, :size])
            routes[index] += routes_of(out.trace, index, size)
            done[index] += size
    return [Row(torch.cat(piece), route) for piece, route in zip(pieces, routes, strict=True)]


def assert_cached_equals_full(
    case: str, cut: str, depth: int | str | None = None, dtype: torch.dtype = torch.float64, atol: float = 1e-9
) -> None:
    """Logits, and in float64, where no margin is as small as the rounding, the route of every token."""
    model, chunks = eval_model(case, dtype), CHUNKS[cut]
    rows = ragged_rows(case, [sum(sizes) for sizes in chunks])
    with torch.no_grad():
        for row, cached in zip(rows, cached_pass(model, rows, chunks, depth), strict=True):
            full = full_pass(model, row, depth)
            assert largest_change(cached.logits, full.logits) <= atol
            assert dtype != torch.float64 or cached.routes == full.routes


@pytest.mark.parametrize("cut", CHUNKS)
@pytest.mark.parametrize("case", LM_CASES)
def test_cached_equals_full(case: str, cut: str) -> None:
    assert_cached_equals_full(case, cut)


@pytest.mark.parametrize("case", ROUTED)
def test_routes_that_are_compared_differ_between_tokens(case: str) -> None:
    """The agreement of routes above would say nothing if all tokens went one way."""
    with torch.no_grad():
        passes = [full_pass(eval_model(case), row, None) for row in ragged_rows(case, [14, 14])]
    routes = [route for one in passes for route in one.routes]
    kinds = {name: {str(route[name]) for route in routes} for name in routes[0]}
    decided = [name for name in kinds if ".mixer." in name or case in DEPTH_ROUTED]
    assert decided
    assert all(len(kinds[name]) > 1 for name in decided), kinds


@pytest.mark.parametrize("case", [case for case in LM_CASES if case in PRESETS])
def test_cached_equals_full_in_fp32(case: str) -> None:
    assert_cached_equals_full(case, "ragged", dtype=torch.float32, atol=1e-4)


@pytest.mark.parametrize(("case", "depth"), CASE_DEPTHS)
def test_cached_equals_full_at_call_time_depths(case: str, depth: int | str) -> None:
    assert_cached_equals_full(case, "ragged", depth)


@pytest.mark.parametrize("case", LM_CASES)
def test_generate_cached_equals_uncached(case: str) -> None:
    """Greedy, prompts of different lengths; a row is what it is alone."""
    model: Any = eval_model(case)
    prompts = [row.tolist() for row in ragged_rows(case, [5, 1, 3])]
    cached = model.generate(prompts, max_new_tokens=5, use_cache=True)
    assert cached == model.generate(prompts, max_new_tokens=5, use_cache=False)
    assert [len(ids) for ids in cached] == [10, 6, 8]
    assert all(ids[: len(prompt)] == prompt for prompt, ids in zip(prompts, cached, strict=True))
    assert cached[1] == model.generate(prompts[1:2], max_new_tokens=5)[0]


@pytest.mark.parametrize("case", LM_CASES)
def test_generate_is_greedy(case: str) -> None:
    """Every new token is the argmax of the full forward over what stands before it."""
    model: Any = eval_model(case)
    prompt = random_tokens(case, 2, 4)
    ids = model.generate(prompt, max_new_tokens=6)
    assert isinstance(ids, torch.Tensor)
    assert ids.shape == (2, 10)
    with torch.no_grad():
        assert torch.equal(model(ids[:, :-1]).logits.argmax(-1)[:, 3:], ids[:, 4:])


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("case", ["recursive", "mor-expert", "token+shared_first", "threshold+shared_first"])
def test_generate_at_call_time_depths(case: str, depth: int | str) -> None:
    model: Any = eval_model(case)
    prompts = [row.tolist() for row in ragged_rows(case, [4, 7])]
    cached = model.generate(prompts, max_new_tokens=6, depth=depth)
    assert cached == model.generate(prompts, max_new_tokens=6, depth=depth, use_cache=False)


@pytest.mark.parametrize("case", ["vanilla", "mor-expert", "mor-token", "more-tuned"])
def test_generate_samples_alike_with_and_without_cache(case: str) -> None:
    model: Any = eval_model(case)
    prompts = [row.tolist() for row in ragged_rows(case, [4, 2])]
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.3, "top_k": 40, "top_p": 0.95}
    cached = model.generate(prompts, seed=7, **options)
    assert cached == model.generate(prompts, seed=7, use_cache=False, **options)
    assert cached != model.generate(prompts, seed=8, **options)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_stops_at_the_end_token(use_cache: bool) -> None:
    model: Any = eval_model("mor-threshold")
    prompts = [row.tolist() for row in ragged_rows("mor-threshold", [4, 6])]
    free = model.generate(prompts, max_new_tokens=10)
    end = free[0][6]
    first = free[0].index(end, 4)
    stopped = model.generate(prompts, max_new_tokens=10, eos_id=end, use_cache=use_cache)
    assert stopped[0] == free[0][: first + 1]
    assert stopped[1] == (free[1][: free[1].index(end, 6) + 1] if end in free[1][6:] else free[1])


def test_generate_narrows_the_choice() -> None:
    """top_k 1 and a tiny top_p are greedy; top_k 3 stays among the three likeliest."""
    model: Any = eval_model("vanilla")
    prompt = random_tokens("vanilla", 1, 5)
    greedy = model.generate(prompt, max_new_tokens=5)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, temperature=2.0, top_k=1, seed=1), greedy)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, temperature=2.0, top_p=1e-6, seed=1), greedy)
    likeliest = model(prompt).logits[0, -1].topk(3).indices.tolist()
    drawn = {int(model.generate(prompt, max_new_tokens=1, temperature=5.0, top_k=3, seed=s)[0, -1]) for s in range(20)}
    assert len(drawn) > 1
    assert drawn <= set(likeliest)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 200])
@pytest.mark.parametrize("top_p", [None, 0.2, 0.9, 1.0])
def test_rows_are_drawn_as_if_alone(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """A row's tokens depend on its logits and its generator only, ties at the edges of top_k and top_p included."""
    logits = (3 * torch.randn(6, 97, generator=torch.Generator().manual_seed(0))).round()

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in range(6)]

    own = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    together, alone = generators(), generators()
    for _ in range(4):
        drawn = sample(logits, [own] * 6, together).tolist()
        rows = zip(logits, alone, strict=True)
        assert drawn == [int(sample(row[None], [own], [draw])) for row, draw in rows]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_that_has_ended_leaves_its_neighbours_alone(use_cache: bool) -> None:
    model: Any = eval_model("mor-expert")
    prompts = [row.tolist() for row in ragged_rows("mor-expert", [9, 2, 4])]
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5, "use_cache": use_cache}
    free = model.generate(prompts, **options)
    for end in {ids[len(prompt) + 2] for prompt, ids in zip(prompts, free, strict=True)}:
        for prompt, ids, stopped in zip(prompts, free, model.generate(prompts, eos_id=end, **options), strict=True):
            new = ids[len(prompt) :]
            assert stopped == prompt + (new[: new.index(end) + 1] if end in new else new)


def test_generate_leaves_training_mode_as_it_was() -> None:
    model: Any = fresh_model("mor-expert")
    prompt = random_tokens("mor-expert", 1, 5)
    ids = model.generate(prompt, max_new_tokens=4)
    assert model.training
    assert torch.equal(ids, model.eval().generate(prompt, max_new_tokens=4))


@pytest.mark.parametrize("case", RECURRENT)
def test_depth_policies_are_functions_of_position(case: str) -> None:
    """uniform:N; adaptive 1 + floor((R - 1) * min(1, t / span)); progressive, equal steps of span."""
    model = eval_model(case)
    most = config_of(case).schedule.recursions
    tokens, t = random_tokens(case, 2, 24), torch.arange(24)

    def depths(policy: int | str) -> torch.Tensor:
        groups = model(tokens, depth=policy, return_trace=True).trace.active.values()
        counts = [torch.stack(list(masks)).sum(0) for masks in groups]
        assert all(torch.equal(count, counts[0]) for count in counts)
        return counts[0]

    def both(expected: torch.Tensor) -> torch.Tensor:
        return expected.expand(2, -1)

    assert torch.equal(depths("uniform:2"), both(torch.full((24,), 2)))
    assert torch.equal(depths(1), both(torch.full((24,), 1)))
    adaptive = 1 + ((most - 1) * (t / 8).clamp(max=1)).floor().long()
    assert torch.equal(depths("adaptive:8"), both(adaptive))
    progressive = (1 + t * most // 12).clamp(max=most)
    assert torch.equal(depths("progressive:12"), both(progressive))


@pytest.mark.parametrize("case", [*RECURRENT, "recursive+norms"])
def test_each_row_may_have_a_depth_of_its_own(case: str) -> None:
    """In training too; and each row is as it would be alone, or all are refused where depths change windows."""
    tokens, depth = random_tokens(case, 3, 12), torch.tensor([2, 1, config_of(case).schedule.recursions])
    if config_of(case).windows_move:
        with pytest.raises(ValueError, match=r"depth of each row .* global; give all rows one depth"):
            eval_model(case)(tokens, depth=depth)
        return
    for model in (eval_model(case), fresh_model(case)) if case in REPEATABLE else (eval_model(case),):
        together = model(tokens, depth=depth, return_trace=True)
        for row, recursions in enumerate(depth.tolist()):
            alone = model(tokens[row : row + 1], depth=recursions).logits
            assert largest_change(alone[0], together.logits[row]) <= 1e-9
        for masks in together.trace.active.values():
            assert torch.equal(torch.stack(list(masks)).sum(0), depth[:, None].expand(-1, 12))


@pytest.mark.parametrize(
    ("depth", "sentence"),
    [
        (torch.tensor([1]), r"the shape \[2\], not \[1\]"),
        (torch.tensor(1), r"the shape \[2\], not \[\]"),
        (torch.tensor([[1], [1]]), r"\[batch\], not torch.int64 of the shape \[2, 1\]"),
        (torch.tensor([1.0, 2.0]), r"integers of the shape \[batch\], not torch.float32"),
        (torch.tensor([0, 2]), r"asks for 0 recursions; this model takes 1 or more"),
    ],
)
def test_impossible_depths_of_rows_are_refused(depth: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"depth of each row .*{sentence}"):
        eval_model("recursive")(random_tokens("recursive"), depth=depth)


@pytest.mark.parametrize("depth", ["uniform", "uniform:0", 0, -1, "sideways", "adaptive:x", "progressive:0", "oracle"])
def test_impossible_depths_are_refused(depth: int | str) -> None:
    with pytest.raises(ValueError, match=r"depth") as refusal:
        eval_model("recursive")(random_tokens("recursive"), depth=depth)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "case",
    [
        *("recursive+step_embedding", "recursive+norms", "recursive+lora"),
        *("mor-expert", "mor-token", "mor-threshold", "mor-act", "mor-random"),
    ],
)
def test_recursions_with_weights_of_their_own_end_where_these_end(case: str) -> None:
    for depth in (4, "uniform:4", torch.tensor([1, 4])):
        with pytest.raises(ValueError, match=r"depth .*4.* 1 to 3"):
            eval_model(case)(random_tokens(case), depth=depth)


@pytest.mark.parametrize("case", LM_CASES)
def test_cache_grows_with_the_tokens(case: str) -> None:
    model: Any = eval_model(case)
    tokens = random_tokens(case)
    with torch.no_grad():
        cache = model.new_cache(2)
        model(tokens[:, :8], cache=cache)
        half = cache.bytes()
        model(tokens[:, 8:], cache=cache)
    assert 0 < half < cache.bytes()


def test_shared_first_needs_less_cache() -> None:
    sizes = {}
    for kv in ("per_recursion", "shared_first"):
        model: Any = morex.build_model(load("recursive", f"model.kv={kv}").model).eval()
        cache = model.new_cache(2)
        model(random_tokens("recursive"), cache=cache)
        sizes[kv] = cache.bytes()
    schedule = config_of("recursive").schedule.resolved
    assert sizes["shared_first"] * schedule.unrolled_depth == sizes["per_recursion"] * schedule.num_blocks
