"""Invariant 7: eval and seeded training repeat to the bit, forward writes no state, nothing grows from step to step."""

import copy
import gc
from typing import Any

import pytest
import torch

import morex
from parity.detectors import count_nodes
from parity.helpers import (
    CASES,
    config_of,
    eval_model,
    fresh_model,
    labels_for,
    pad,
    ragged_rows,
    random_tokens,
    tensors_in,
)


def train(case: str, steps: int = 2, seed: int = 7) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of a short training with routers updated after each step."""
    torch.manual_seed(seed)
    model: Any = morex.build_model(config_of(case)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(1, steps + 1):
        tokens = torch.randint(97, (2, 16))
        first, second = (model(half, labels=labels_for(case, half)) for half in tokens.chunk(2))
        (0.5 * (first.loss + second.loss)).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers(first.stats + second.stats, step)
        losses.append(first.loss.item() + second.loss.item())
    return losses, model.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", CASES)
def test_deterministic_eval(case: str) -> None:
    model, tokens = eval_model(case, torch.float32), random_tokens(case)
    torch.manual_seed(1)
    first = model(tokens).logits
    torch.manual_seed(2)
    assert torch.equal(model(tokens).logits, first)


@pytest.mark.parametrize("case", CASES)
def test_deterministic_training(case: str) -> None:
    losses, weights = train(case)
    again, same_weights = train(case)
    assert losses == again
    assert same(weights, same_weights)
    assert train(case, steps=1, seed=8)[0] != losses[:1]


@pytest.mark.parametrize("case", CASES)
def test_deterministic_initialisation(case: str) -> None:
    """The config's seed decides, whatever the global generator has done; another seed gives other weights."""
    config = config_of(case)
    torch.manual_seed(3)
    first = morex.build_model(config).state_dict()
    torch.manual_seed(4)
    second = morex.build_model(config).state_dict()
    assert same(first, second)
    other = morex.build_model(config.model_copy(update={"seed": config.seed + 1})).state_dict()
    assert not torch.equal(other["embedding.weight"], first["embedding.weight"])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_forward_writes_no_state(case: str, mode: str) -> None:
    """Neither weights nor buffers, registered or not, nor attributes that hold tensors."""
    model = fresh_model(case).train(mode == "train")
    tokens, lengths = pad(ragged_rows(case, [16, 5]))
    model(tokens, labels=labels_for(case, tokens, lengths), lengths=lengths)

    def everything() -> dict[str, torch.Tensor]:
        found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    found[f"{path}:{name}"] = value.detach().clone()
            found |= {f"{path}:{name}": value.clone() for name, value in module.named_buffers(recurse=False)}
        return found

    before = everything()
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    out = model(tokens, labels=labels_for(case, tokens, lengths), lengths=lengths, return_trace=True)
    if mode == "train":
        out.loss.backward()
    assert same(everything(), before)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes


@pytest.mark.parametrize("case", CASES)
def test_update_routers_writes_buffers_only(case: str) -> None:
    model = fresh_model(case)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = random_tokens(case)
    model.update_routers(model(tokens, labels=labels_for(case, tokens)).stats, 1)
    assert same({name: p.detach() for name, p in model.named_parameters()}, weights)


@pytest.mark.parametrize("case", CASES)
def test_nothing_grows_from_step_to_step(case: str) -> None:
    """As many autograd nodes, as many numbers in the statistics, no tensor kept, at step 4 as at step 2.

    Thresholds that move change how many candidates there are; they are put back after every step.
    """
    model: Any = fresh_model(case)
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tokens = random_tokens(case)
    nodes, numbers, alive = [], [], []
    gc.freeze()  # what lives already is not looked at again
    for step in range(1, 5):
        torch.manual_seed(0)  # what is dropped may turn a token another way
        out = model(tokens, labels=labels_for(case, tokens))
        nodes.append(count_nodes(out.loss))
        numbers.append(sum(tensor.numel() for tensor in tensors_in(out.stats)))
        assert not any(tensor.requires_grad for tensor in tensors_in(out.stats))
        out.loss.backward()
        model.zero_grad(set_to_none=True)
        model.update_routers(copy.deepcopy(out.stats), step)
        for name, buffer in model.named_buffers():
            buffer.copy_(start[name])
        del out
        if step in (2, 4):
            gc.collect()
            alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    gc.unfreeze()
    assert nodes[-1] == nodes[1]
    assert numbers[-1] == numbers[1]
    assert alive[1] <= alive[0]
