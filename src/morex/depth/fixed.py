"""`fixed`: every token takes all recursions, or as many as the caller says."""

from morex.depth.policy import DepthPolicy
from morex.depth.router import DepthRouter


class FixedRouter(DepthRouter):
    """No decision: R recursions for all tokens, any number at call time."""

    any_depth = True

    def takes_all(self, policy: DepthPolicy) -> bool:
        return not policy.is_forced or super().takes_all(policy)
