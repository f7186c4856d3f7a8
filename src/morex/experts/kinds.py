"""The expert layers by `kind`."""

from morex.experts.moe import MoE
from morex.experts.recursive import RecursiveExperts

EXPERTS: dict[str, type[MoE] | type[RecursiveExperts]] = {"moe": MoE, "recursive": RecursiveExperts}
