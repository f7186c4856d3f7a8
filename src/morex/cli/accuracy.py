"""Tables of an evaluation: its rules by name, and the accuracy of a task under each of them."""

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from morex.eval.accuracy import Scores
    from morex.eval.loss import EvalResult

Value = TypeVar("Value")


def rules(result: "EvalResult", depth: str | None, own: Value, oracle: Value | None) -> list[tuple[str, Value]]:
    """What was measured under each rule, by the rule's name: `own` under that of `result.loss`, `oracle` beside it."""
    seen_ahead = "oracle (sees later tokens)"
    if depth is not None:
        return [(f"depth {depth}", own)]
    if result.is_oracle:
        return [(seen_ahead, own)]
    if oracle is not None:
        return [("causal (as in decoding)", own), (seen_ahead, oracle)]
    return [("held-out set", own)]


def rule_name(rule: str | int) -> str:
    """The name of a rule, or of a fixed number of recursions."""
    return f"every token at depth {rule}" if isinstance(rule, int) else rule


def accuracy_table(result: "EvalResult", depth: str | None, by_difficulty: bool) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: one row a rule, or with `by_difficulty` one a difficulty and a column of accuracy a rule."""
    assert result.scores is not None
    own = rules(result, depth, result.scores, result.oracle_scores)
    measured: list[tuple[str | int, Scores]] = [*own, *(result.scores_by_depth or {}).items()]
    if not by_difficulty:
        headings = [f"{result.scores.all.examples:,} examples", "accuracy", "token accuracy", "loss"]
        return headings, [
            [rule_name(rule), f"{one.all.accuracy:.2%}", f"{one.all.token_accuracy:.2%}", f"{one.all.loss:.4f}"]
            for rule, one in measured
        ]
    names = [f"depth {rule}" if isinstance(rule, int) else rule for rule, _ in measured]
    rows = [
        [str(level), f"{score.examples:,}", *(f"{one.by_difficulty[level].accuracy:.2%}" for _, one in measured)]
        for level, score in result.scores.by_difficulty.items()
    ]
    rows.append(["all", f"{result.scores.all.examples:,}", *(f"{one.all.accuracy:.2%}" for _, one in measured)])
    return ["difficulty", "examples", *names], rows
