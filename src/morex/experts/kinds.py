"""The expert layers by `kind`."""

from typing import Any, Protocol

from torch import nn

from morex.experts.huginn import HuginnExperts
from morex.experts.layer_recurrent import LayerRecurrentExperts
from morex.experts.moe import MoE
from morex.experts.recursive import RecursiveExperts
from morex.experts.shared_recurrent import SharedRecurrentExperts
from morex.nn.costs import Costs


class ExpertKind(Protocol):
    """A class of expert layers, and what it costs in closed form."""

    def __call__(self, *sizes: Any, **options: Any) -> nn.Module:
        """A layer: width of the model, `ExpertRouter`, `AttentionShape` and eps of the norms, then its own options."""

    def costs(self, *sizes: Any, **options: Any) -> Costs:
        """Width, experts E, K of them for a token, `AttentionShape`, then its own options."""


EXPERTS: dict[str, ExpertKind] = {
    "moe": MoE,
    "recursive": RecursiveExperts,
    "huginn": HuginnExperts,
    "shared_recurrent": SharedRecurrentExperts,
    "layer_recurrent": LayerRecurrentExperts,
}
