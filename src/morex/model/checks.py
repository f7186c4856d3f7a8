"""Input that a model cannot take, refused with one sentence."""

import torch
from torch import Tensor

from morex.cache.batch import KVCache
from morex.cache.fixed import FixedCache
from morex.config import ModelConfig
from morex.depth.policy import Depth, DepthPolicy


def check_tensors(**given: object) -> None:
    """Refuses what is given and no tensor, such as a list of lists. Raises ValueError."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(
                f"{name} must be a tensor of integers, not of the type {type(value).__name__}; use torch.tensor"
            )


def check_batch(
    config: ModelConfig,
    training: bool,
    tokens: Tensor,
    lengths: Tensor | None,
    positions: Tensor | None,
    documents: Tensor | None,
    depth: Depth | Tensor,
    cache: KVCache | FixedCache | None,
) -> None:
    """Refuses a batch that does not fit the model or itself; arguments as of its forward. Raises ValueError."""
    if tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
        raise ValueError(
            "tokens must be integers of the shape [batch, time], at least one of each, not "
            f"{tokens.dtype} of the shape {list(tokens.shape)}"
        )
    if cache is not None:
        refuse_decoding(config, "a cache")
    if documents is not None and config.head.kind == "classifier":
        raise ValueError(
            "document_ids tell several texts of a row apart, and model.head.kind 'classifier' gives a row one "
            "class; give each text a row of its own"
        )
    if cache is not None and training:
        raise ValueError("a cache is for inference, and this model is in training mode; call eval() first")
    size = config.vocab_size
    check_below(size, "token id", tokens, f"the vocabulary of {size} (model.vocab_size)")
    batch, time = tokens.shape
    if lengths is not None and tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths must have the shape [{batch}], not {list(lengths.shape)}")
    if lengths is not None and lengths.is_floating_point():
        raise ValueError(f"lengths must be integers, not {lengths.dtype}")
    if isinstance(depth, Tensor):
        _check_rows(config, depth, batch)
    for name, given in (("positions", positions), ("document_ids", documents)):
        if given is not None and tuple(given.shape) != (batch, time):
            raise ValueError(f"{name} must have the shape {[batch, time]}, not {list(given.shape)}")
    if lengths is not None and lengths.device.type == "cpu":
        least, most = int(lengths.min()), int(lengths.max())
        if least < 0 or most > time:
            raise ValueError(f"lengths must lie between 0 and the {time} columns of tokens, not {least}..{most}")
    if cache is not None and documents is not None:
        raise ValueError("document_ids go with whole sequences; a cache holds one document a row, leave them out")
    if cache is not None and len(cache.sequences) != batch:
        raise ValueError(f"the cache is for {len(cache.sequences)} sequences, but tokens have {batch} rows")


def _check_rows(config: ModelConfig, depth: Tensor, batch: int) -> None:
    """Refuses a depth of each row that has another shape, or would let a row change what its neighbours see."""
    if depth.shape[:1] != (batch,):
        raise ValueError(f"depth of each row must have the shape [{batch}], not {list(depth.shape)}")
    if config.windows_move:
        raise ValueError(
            "depth of each row would let the deepest one say which steps of the others are global; give all rows one "
            "depth, or use a model without attention.global_every"
        )


def check_exit(config: ModelConfig, training: bool, policy: DepthPolicy, asked: str) -> None:
    """Refuses an exit policy, which the caller wrote as `asked`, that the model cannot follow. Raises ValueError."""
    if config.kv == "per_recursion":
        raise ValueError(
            f"{asked} lets tokens leave that later tokens still have to see, and with model.kv 'per_recursion' "
            "these have no keys beyond the recursion where they left; use a model with kv 'refresh' or "
            "'shared_first'"
        )
    if training and policy.rule != "gate":
        raise ValueError(f"{asked} is a rule for inference, and this model is in training mode; call eval() first")
    if config.schedule.resolved.num_groups > 1 or config.head.kind != "lm":
        raise ValueError(
            f"{asked} asks what a state would become at once, which needs one routed group and a language model; "
            f"this model has schedule.sharing {config.schedule.sharing!r} and head.kind {config.head.kind!r}"
        )


def refuse_decoding(config: ModelConfig, what: str) -> None:
    """Refuses `what` is for decoding where the model does not decode. Raises ValueError."""
    if config.head.kind == "classifier":
        raise ValueError(f"{what} is for decoding, and model.head.kind 'classifier' does not decode; use kind 'lm'")


def check_decodes(config: ModelConfig, depth: Depth) -> None:
    """Refuses to generate where there is no next token, or none without later ones. Raises ValueError."""
    refuse_decoding(config, "generate")
    if depth is None and config.depth.kind == "expert_choice" and config.depth.causal == "none":
        raise ValueError(
            "this model was trained with depth.causal 'none' and has no causal rule to decode by; give a fixed depth, "
            f"such as {config.schedule.recursions}, or train with depth.causal 'aux_loss'"
        )


def check_below(end: int, what: str, numbers: Tensor, place: str) -> None:
    """Refuses numbers outside 0..end - 1; on a GPU the look would cost a wait."""
    if torch.compiler.is_compiling() or numbers.device.type != "cpu" or not numbers.numel():
        return
    low, high = (int(value) for value in numbers.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"{what} {low if low < 0 else high} is outside {place}")
