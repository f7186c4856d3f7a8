"""The depth routers by `kind`."""

from morex.depth.exit_gate import ExitGateRouter
from morex.depth.expert_choice import ExpertChoiceRouter
from morex.depth.fixed import FixedRouter
from morex.depth.halting import HaltingRouter
from morex.depth.random_choice import RandomRouter
from morex.depth.router import DepthRouter
from morex.depth.sampled import SampledRouter
from morex.depth.threshold import ThresholdRouter
from morex.depth.token_choice import TokenChoiceRouter

ROUTERS: dict[str, type[DepthRouter]] = {
    "fixed": FixedRouter,
    "expert_choice": ExpertChoiceRouter,
    "token_choice": TokenChoiceRouter,
    "threshold": ThresholdRouter,
    "halting": HaltingRouter,
    "exit_gate": ExitGateRouter,
    "sampled": SampledRouter,
    "random": RandomRouter,
}
