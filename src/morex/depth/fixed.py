"""`fixed`: every token takes all recursions, or as many as the caller or an exit rule says."""

from morex.depth.exits import ExitRuleRouter


class FixedRouter(ExitRuleRouter):
    """No decision: R recursions for all tokens, any number at call time."""

    any_depth = True
