"""Depth at call time: what `depth=` of a forward call means.

Besides a router's own decision (None) and the oracle's, a caller can fix the depth of each token as a function of its
absolute position t: `uniform:N` gives N everywhere, `adaptive:span` gives 1 + floor((R - 1) min(1, t / span)), and
`progressive:span` gives R equal steps over the span. A tensor [B] gives each row of a batch its own number.

With `exit:RULE:THRESHOLD` each token leaves as soon as a rule says so. Which rules there are depends on the router. The
rule may be left out for the router's first one, and the threshold for its default.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Depth = int | str | None
BY_DIFFICULTY = "difficulty"
"""What training and evaluation call the depth that gives each example as many recursions as it is difficult."""
PEEKING = ("kl", "entropy", "argmax")
"""Exit rules that look at the distribution of the next token."""
EXAMPLES = "an integer, 'uniform:N', 'adaptive[:SPAN]', 'progressive[:SPAN]', 'exit[:RULE][:THRESHOLD]' or 'oracle'"


@dataclass(frozen=True, eq=False)
class DepthPolicy:
    """A parsed `depth=`; `kind` 'router' leaves the decision to the router."""

    kind: Literal["router", "oracle", "uniform", "adaptive", "progressive", "rows", "exit"] = "router"
    recursions: int = 1
    """Recursions that are run at most."""
    span: int = 1
    """Positions over which `adaptive` and `progressive` go from 1 to R."""
    rows: Tensor | None = None
    """Recursions of each row of the batch [B], for `rows`."""
    rule: str | None = None
    """By which rule tokens leave."""
    threshold: float | None = None
    """Threshold of the rule; None: its default."""

    @property
    def is_forced(self) -> bool:
        """Whether the caller decides, and not the router."""
        return self.kind in ("uniform", "adaptive", "progressive", "rows")

    def depths(self, position: Tensor, row: Tensor) -> Tensor:
        """Recursions of each token [N] from its position [N] and its row [N]."""
        reach = self.recursions - 1
        if self.rows is not None:
            return self.rows.to(row.device)[row]
        if self.kind == "uniform":
            return torch.full_like(position, self.recursions)
        if self.kind == "adaptive":
            return 1 + reach * position.clamp(max=self.span) // self.span
        return 1 + (self.recursions * position // self.span).clamp(max=reach)


def parse_depth(
    depth: Depth | Tensor, recursions: int, span: int, any_depth: bool, exit_rules: tuple[str, ...] = ()
) -> DepthPolicy:
    """Reads `depth=`.

    Args:
        depth: None, an integer N (the same as `uniform:N`), integers for each row [B], or a policy by name.
        recursions: R of the model.
        span: default span of the position-based policies.
        any_depth: whether more than R recursions make sense.
        exit_rules: exit rules that the model knows, its own one first.

    Raises:
        ValueError: it is none of these, or N is out of range, or the model does not know the rule.
    """
    if depth is None:
        return DepthPolicy("router", recursions)
    if isinstance(depth, Tensor):
        return _parse_rows(depth, recursions, any_depth)
    name, _, argument = str(depth).partition(":")
    if name.isdecimal() and not argument:
        name, argument = "uniform", name
    if name == "oracle" and not argument:
        return DepthPolicy("oracle", recursions)
    if name == "uniform" and argument.isdecimal():
        wanted = int(argument)
        if wanted < 1 or (wanted > recursions and not any_depth):
            raise _out_of_range(repr(depth), wanted, recursions, any_depth)
        return DepthPolicy("uniform", wanted)
    if name in ("adaptive", "progressive") and (not argument or (argument.isdecimal() and int(argument) > 0)):
        kind: Literal["adaptive", "progressive"] = "adaptive" if name == "adaptive" else "progressive"
        return DepthPolicy(kind, recursions, int(argument or span))
    if name == "exit":
        return _parse_exit(str(depth), argument, recursions, exit_rules)
    raise ValueError(f"depth {depth!r} is not understood; use {EXAMPLES}")


def _parse_rows(rows: Tensor, recursions: int, any_depth: bool) -> DepthPolicy:
    """Reads recursions of each row."""
    if rows.dim() != 1 or not rows.numel() or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(
            f"depth of each row must be integers of the shape [batch], not {rows.dtype} of the shape {list(rows.shape)}"
        )
    least, most = (int(value) for value in rows.aminmax())
    if least < 1 or (most > recursions and not any_depth):
        raise _out_of_range("of each row", least if least < 1 else most, recursions, any_depth)
    return DepthPolicy("rows", most, rows=rows)


def _out_of_range(asked: str, wanted: int, recursions: int, any_depth: bool) -> ValueError:
    limit = "1 or more" if any_depth else f"1 to {recursions}" if recursions > 1 else "1 alone, having no more"
    return ValueError(f"depth {asked} asks for {wanted} recursions; this model takes {limit}")


def _parse_exit(depth: str, argument: str, recursions: int, exit_rules: tuple[str, ...]) -> DepthPolicy:
    """Reads what stands after `exit:`."""
    if not exit_rules:
        raise ValueError(
            f"depth {depth!r} is for routers with exit rules (fixed, sampled, exit_gate), and this model's has none"
        )
    rule, _, number = argument.partition(":")
    if not number and _threshold(rule) is not None:
        rule, number = "", rule
    rule = rule or exit_rules[0]
    if rule not in exit_rules:
        raise ValueError(f"depth {depth!r} names an exit rule that this model has not; use {' or '.join(exit_rules)}")
    threshold = _threshold(number)
    if number and (threshold is None or not 0 < threshold < math.inf):
        raise ValueError(f"depth {depth!r} needs a finite threshold above 0, such as exit:{rule}:0.5")
    return DepthPolicy("exit", recursions, rule=rule, threshold=threshold)


def _threshold(text: str) -> float | None:
    """The number in a text, or None where there is none."""
    try:
        return float(text)
    except ValueError:
        return None
