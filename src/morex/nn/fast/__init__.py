"""Hand-written fast paths for the CPU, and the only place for them.

Each stands behind one function of `morex.nn` or `morex.experts`, whose body is the plain version; `enabled(False)`
makes every function take it. What is fast here: batched products with a manual softmax for the short rows that routing
leaves, rotation as a complex product, gathers whose gradient is a gather, residual sums inside matrix products, and
fewer tensors kept for the backward pass.
"""

from morex.nn.fast.causal import attend, fits, joint_weight, mean_keys
from morex.nn.fast.experts import recursive_experts
from morex.nn.fast.feed_forward import feed_forward_experts, swiglu
from morex.nn.fast.frame import Frames
from morex.nn.fast.grouped import expert_linear
from morex.nn.fast.native import (
    attend_pages,
    attend_rows,
    few_norms,
    few_rows,
    is_native,
    kernel_seconds,
    likeliest,
    project,
    reads_pages,
    takes_logits,
    takes_norm,
    takes_rows,
)
from morex.nn.fast.norm import rms_norm
from morex.nn.fast.plan import Plan
from morex.nn.fast.recurrent import recurrent_experts
from morex.nn.fast.rows import combine_rows, gather_rows
from morex.nn.fast.single import few_tokens, single_token, takes_tokens
from morex.nn.fast.switch import available, enabled, usable
from morex.nn.fast.tables import Tables, claim
from morex.nn.fast.walk import Sight, Walk

__all__ = [
    "Frames",
    "Plan",
    "Sight",
    "Tables",
    "Walk",
    "attend",
    "attend_pages",
    "attend_rows",
    "available",
    "claim",
    "combine_rows",
    "enabled",
    "expert_linear",
    "feed_forward_experts",
    "few_norms",
    "few_rows",
    "few_tokens",
    "fits",
    "gather_rows",
    "is_native",
    "joint_weight",
    "kernel_seconds",
    "likeliest",
    "mean_keys",
    "project",
    "reads_pages",
    "recurrent_experts",
    "recursive_experts",
    "rms_norm",
    "single_token",
    "swiglu",
    "takes_logits",
    "takes_norm",
    "takes_rows",
    "takes_tokens",
    "usable",
]
