"""The experts of the Mixture of Recurrent Experts in plain loops over tokens, from their definitions alone."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parity.formulas import feed_forward, rms_norm, softmax
from parity.reference import Place, Reference, States


class RecurrentReference(Reference):
    """`Reference` for the expert kinds `huginn`, `shared_recurrent` and `layer_recurrent`, in eval mode."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], training: bool) -> None:
        super().__init__(config, weights, training)
        self.paths: dict[tuple[int, int], list[list[Tensor]]] = {}
        """(block, position) -> the states, first to last, of each visit to an expert, or to a layer that recurs."""
        self.entropies: dict[tuple[int, int], list[float]] = {}
        """(block, position) -> entropy of the averaged logits before the floor, at each step."""

    def mixer(self, index: int, inputs: States, step: Place = (0, 0, 0)) -> States:
        name = f"stack.blocks.{index}.mixer."
        match self.config["mixer"]["kind"]:
            case "huginn":
                return self.mixture(index, name, inputs, recurrent=True)
            case "shared_recurrent":
                return self.recur(name + "shared.", 0, self.mixture(index, name, inputs, recurrent=False))
            case "layer_recurrent":
                return self.recur_layer(index, name, inputs)
        return super().mixer(index, inputs, step)

    def mixture(self, index: int, name: str, inputs: States, recurrent: bool) -> States:
        """Weighted sum of what each token's experts return."""
        chosen = {t: self.choose_experts(index, name, x) for t, x in inputs.items()}
        outputs = {t: torch.zeros_like(x) for t, x in inputs.items()}
        for expert in range(self.config["mixer"]["router"]["experts"]):
            visitors = {t: x for t, x in inputs.items() if expert in chosen[t]}
            run = self.recur if recurrent else self.feed_forward_expert
            for t, y in run(name, expert, visitors).items():
                outputs[t] = outputs[t] + chosen[t][expert] * y
        return outputs

    def recur(self, name: str, expert: int, inputs: States) -> States:
        """Huginn's block from a state of zeros."""

        def own(part: str) -> Tensor:
            return self.weights[name + part][expert]

        states = {t: torch.zeros_like(x) for t, x in inputs.items()}
        block = int(name.split(".")[2])
        paths = {t: [s] for t, s in states.items()}
        for t, path in paths.items():
            self.paths.setdefault((block, t), []).append(path)
        for _ in range(self.config["mixer"]["steps"]):
            states = {t: own("adapter") @ torch.cat((s, inputs[t])) for t, s in states.items()}
            normed = {t: rms_norm(s, own("norm1"), self.eps) for t, s in states.items()}
            if self.config["mixer"].get("attention_scope") == "token":
                seen = {t: self.look_at_oneself(x, own("v"), own("o")) for t, x in normed.items()}
            else:
                seen = self.attention(normed, normed, {f"{part}.weight": own(part) for part in "qkvo"})
            states = {t: rms_norm(s + seen[t], own("norm2"), self.eps) for t, s in states.items()}
            for t, s in states.items():
                inner = rms_norm(s, own("norm3"), self.eps)
                gated = feed_forward("swiglu", inner, own("up"), own("down"), own("gate"))
                states[t] = rms_norm(s + gated, own("norm4"), self.eps)
                paths[t].append(states[t])
        return states

    def recur_layer(self, index: int, name: str, inputs: States) -> States:
        """Each token by itself: route on the state, mix, add, and again."""
        mixer = self.config["mixer"]
        experts = mixer["router"]["experts"]
        floor = min(mixer["entropy_floor"], 0.9 * math.log(experts))
        outputs = {}
        for t, x in inputs.items():
            state, average, path = x, None, [x]
            self.paths.setdefault((index, t), []).append(path)
            for _ in range(mixer["steps"]):
                logits = (self.weights[name + "router.weight"] @ state).tolist()
                if average is None:
                    average = logits
                else:
                    average = [mixer["ema"] * a + (1 - mixer["ema"]) * b for a, b in zip(average, logits, strict=True)]
                self.entropies.setdefault((index, t), []).append(entropy(average))
                probabilities = softmax(warmed(average, floor))
                best = sorted(range(experts), key=lambda e: -probabilities[e])[: mixer["router"]["top_k"]]
                total = sum(probabilities[e] for e in best) if len(best) > 1 else 1.0
                change = torch.zeros_like(x)
                for e in best:
                    (y,) = self.feed_forward_expert(name, e, {t: state}).values()
                    change = change + probabilities[e] / total * y
                state = state + mixer["scale"] * change
                path.append(state)
            outputs[t] = state - x
        return outputs


def warmed(logits: list[float], floor: float) -> list[float]:
    """Logits over the least temperature >= 1 at which their entropy is `floor` or more, by plain search."""

    def at(temperature: float) -> list[float]:
        return [logit / temperature for logit in logits]

    if entropy(at(1.0)) >= floor:
        return logits
    low, high = 1.0, 2.0
    while entropy(at(high)) < floor:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if entropy(at(middle)) >= floor else (middle, high)
    return at(high)


def entropy(logits: list[float]) -> float:
    return -sum(p * math.log(p) for p in softmax(logits) if p > 0)
