"""What finds the faults of earlier programs in a model: each function measures one kind, or names where it is.

They see the model from outside, so that a fault can be planted in any part of it to see that it is found.
"""

import copy
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import morex
from morex.depth.token_choice import TokenChoiceRouter
from morex.experts.router import ExpertRouter
from parity.helpers import labels_in, largest_change, pad, row_logits, tensors_in


def future_leak(model: Any, tokens: Tensor, places: Sequence[int] = (0, 6, 11), **options: Any) -> float:
    """How far logits, of a classifier states, at or before a place move when every later token becomes another one."""

    def by_token(given: Tensor) -> Tensor:
        out = model(given, return_trace=model.config.head.kind != "lm", **options)
        if out.trace is None:
            return out.logits.transpose(0, 1)
        return torch.stack([state.transpose(0, 1) for states in out.trace.states.values() for state in states], 1)

    with torch.no_grad():
        before, leak = by_token(tokens), 0.0
        for t in places:
            changed = tokens.clone()
            changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % model.config.vocab_size
            moved = by_token(changed)
            leak = max(leak, largest_change(moved[: t + 1], before[: t + 1]))
            assert not torch.equal(moved[t + 1 :], before[t + 1 :]), "the changed tokens are not seen at all"
    return leak


def spread_of_evaluation(model: Any, tokens: Tensor) -> float:
    """How far two evaluations of the same tokens are apart, the global random state moved on between them."""
    with torch.no_grad():
        return largest_change(model(tokens).logits, model(tokens).logits)


def batch_dependence(model: Any, rows: Sequence[Tensor]) -> float:
    """How far the logits of rows alone are from those of the same rows in one right-padded batch."""
    tokens, lengths = pad(rows)
    with torch.no_grad():
        together = model(tokens, lengths=lengths).logits
        alone = [model(row[None]).logits[0] for row in rows]
    return max(largest_change(own, row_logits(shared, len(own))) for own, shared in zip(alone, together, strict=True))


def void_entropies(model: Any, tokens: Tensor) -> list[str]:
    """Routers whose reported entropy does not tell how undecided they are.

    It must lie between 0 and ln n, be ln n for a router without preference, and be a number for a saturated one.
    """
    assert model.training
    routers = {name: router for name, router in model.named_modules() if isinstance(router, ROUTERS)}

    def reported(factor: float) -> dict[str, float]:
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in scaled.named_parameters():
                if name.rpartition(".router.")[0] and not name.endswith(".bias"):
                    parameter.mul_(factor)
        stats = scaled(tokens, labels=labels_in(model.config, tokens)).stats
        told = {name: fields for name, fields in stats.items() if "entropy" in fields}
        return {name: float(fields["entropy"]) / int(fields["tokens"]) for name, fields in told.items()}

    own, flat, saturated = reported(1.0), reported(0.0), reported(1e4)
    faults = [name for name in routers if name not in own]
    for name in own:
        most = math.log(_choices(routers[name]))
        decided = 1e-6 < own[name] < most and 0 <= saturated[name] <= most + 1e-6
        if not decided or not math.isclose(flat[name], most, rel_tol=1e-6):
            faults.append(name)
    return faults


ROUTERS = (ExpertRouter, TokenChoiceRouter)


def _choices(router: Any) -> int:
    choices: int = router.experts if isinstance(router, ExpertRouter) else router.recursions
    return choices


def not_finite(model: Any, tokens: Tensor, lengths: Tensor | None = None) -> list[str]:
    """What is NaN or infinite, or is no gradient at all, after a forward and a backward pass.

    Weights that `more` stores and never computes with have no gradient.
    """
    mixer = model.config.mixer
    unused = (".mixer.q", ".mixer.k") if getattr(mixer, "keep_unused_qk", False) else ()
    model.zero_grad(set_to_none=True)
    out = model(tokens, labels=labels_in(model.config, tokens, lengths), lengths=lengths)
    out.loss.backward()
    found = {"logits": out.logits, "loss": out.loss, **out.losses}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if not n.endswith(unused)}
    bad = [name for name, value in found.items() if value is None or not torch.isfinite(value).all()]
    return bad + ["statistics" for value in tensors_in(out.stats) if torch.isnan(value).any()]


def growth(model: Any, shapes: Sequence[tuple[int, int]]) -> list[str]:
    """What has grown after a second round of training steps on batches of these shapes, against the first round."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rounds = []
    for turn in range(2):
        sizes = {}
        for step, (batch, length) in enumerate(shapes):
            tokens = torch.randint(model.config.vocab_size, (batch, length), generator=_generator(step))
            out = model(tokens, labels=labels_in(model.config, tokens))
            sizes[f"graph of the loss on {batch} x {length}"] = count_nodes(out.loss)
            out.loss.backward()
            model.zero_grad(set_to_none=True)
            model.update_routers(out.stats, turn * len(shapes) + step + 1)
            for name, buffer in model.named_buffers():  # thresholds that move would change who is a candidate
                if buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
        kept = _kept(model)
        sizes["tensors kept on modules"] = sum(tensor.numel() for tensor in kept)
        sizes["graphs kept on modules"] = count_nodes(*kept)
        rounds.append(sizes)
    first, second = rounds
    return [what for what, size in first.items() if second[what] > size]


def _kept(model: Any) -> list[Tensor]:
    """Tensors that modules hold beside their parameters."""
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return held + list(model.buffers())


def count_nodes(*ends: Tensor) -> int:
    """Nodes of the autograd graph behind these tensors."""
    seen: set[Any] = set()
    waiting: list[Any] = [end.grad_fn for end in ends]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
    return len(seen)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fault_of_checkpoint(model: Any, shapes: Sequence[tuple[int, int]], folder: Path) -> str | None:
    """Why a model that has trained on batches of these shapes is not what its saved weights make of a new one."""
    for step, (batch, length) in enumerate(shapes, start=1):
        tokens = torch.randint(model.config.vocab_size, (batch, length), generator=_generator(step))
        model.update_routers(model(tokens, labels=labels_in(model.config, tokens)).stats, step)
    save_file(model.state_dict(), folder / "model.safetensors")
    other: Any = morex.build_model(model.config, dtype=model.embedding.weight.dtype)
    try:
        other.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    except RuntimeError as error:
        return str(error)
    with torch.no_grad():
        same = torch.equal(other.eval()(tokens).logits, model.eval()(tokens).logits)
    return None if same else "the loaded model has other logits"


def unread_cache(model: Any, tokens: Tensor) -> list[str]:
    """Slots that one more token writes to and does not read, or writes more than itself to; and a past without effect.

    Args:
        tokens: [B, T]; the last one of each row is fed to a cache that holds the others.
    """
    logits, faults = [], set()
    with torch.no_grad():
        for past in (tokens[:, :-1], tokens[:, :-1].flip(1)):
            cache = model.new_cache(tokens.shape[0])
            written, read = _watched(cache)
            model(past, cache=cache)
            known = set(written)
            written.clear()
            read.clear()
            logits.append(model(tokens[:, -1:], cache=cache).logits)
            faults |= {f"{slot} is not read" for slot in known & set(written) - read}
            faults |= {f"{slot} takes in {count} entries" for slot, count in written.items() if count > tokens.shape[0]}
    if largest_change(*logits) < 1e-6:
        faults.add("another past changes nothing")
    return sorted(faults)


def _watched(cache: Any) -> tuple[dict[Any, int], set[Any]]:
    """Entries written to each slot of a cache, and the slots read, from now on."""
    written: dict[Any, int] = {}
    seen: set[Any] = set()
    append, read, view = cache.append, cache.read, cache.view

    def noted_append(slot: Any, k: Tensor, v: Tensor, packing: Any) -> bool:
        written[slot] = written.get(slot, 0) + k.shape[0]
        fresh: bool = append(slot, k, v, packing)
        return fresh

    def noted(how: Any, slot: Any) -> Any:
        seen.add(slot)
        return how(slot)

    cache.append, cache.read, cache.view = noted_append, partial(noted, read), partial(noted, view)
    return written, seen
