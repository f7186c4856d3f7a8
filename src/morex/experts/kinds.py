"""The expert layers by `kind`."""

from morex.experts.huginn import HuginnExperts
from morex.experts.layer_recurrent import LayerRecurrentExperts
from morex.experts.moe import MoE
from morex.experts.recursive import RecursiveExperts
from morex.experts.shared_recurrent import SharedRecurrentExperts

EXPERTS: dict[str, type[MoE] | type[RecursiveExperts] | type[HuginnExperts]] = {
    "moe": MoE,
    "recursive": RecursiveExperts,
    "huginn": HuginnExperts,
    "shared_recurrent": SharedRecurrentExperts,
    "layer_recurrent": LayerRecurrentExperts,
}
