"""An independent reference: one sequence at a time, one token at a time, in float64, written from the formulas alone.

Nothing of morex is imported. Weights come from a state dict by name, the config as plain data. No batch, no padding, no
packing, no cache: a token's keys are looked up in dictionaries by position. Slow and plain on purpose.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parity.formulas import best, feed_forward, gelu, rms_norm, rotate, sigmoid, softmax

States = dict[int, Tensor]  # position in the sequence -> vector [D]
Place = tuple[int, int, int]  # of a step of the core: group, recursion from 1 (0 elsewhere), block of the group from 0


@dataclass
class Record:
    """What the routers decided, over all sequences, from which the auxiliary losses follow."""

    candidates: dict[tuple[int, int], list[tuple[float, bool]]] = field(default_factory=dict)
    """(group, recursion) -> (logit, active) of each candidate."""
    depths: dict[int, list[tuple[int, list[float], list[float]]]] = field(default_factory=dict)
    """group -> (recursions taken, activated scores, logits) of each token."""
    halted: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    """group -> (recursions taken, remainder) of each token."""
    experts: dict[int, list[tuple[list[int], list[float], list[float]]]] = field(default_factory=dict)
    """block -> (chosen experts, probabilities, logits) of each visit."""


def plain_names(weights: Mapping[str, Any]) -> dict[str, str]:
    """Name in the state dict -> name with all blocks numbered in one row: prelude, core, coda."""

    def count(part: str) -> int:
        return len({name.removeprefix(part).split(".")[0] for name in weights if name.startswith(part)})

    prelude = count("stack.prelude.")
    before = {"prelude": 0, "core.blocks": prelude, "coda": prelude + count("stack.core.blocks.")}
    names = {}
    for name in weights:
        renamed = name.replace("stack.core.groups.", "stack.groups.")
        if found := re.match(r"stack\.(prelude|core\.blocks|coda)\.(\d+)\.(.*)", name):
            renamed = f"stack.blocks.{before[found[1]] + int(found[2])}.{found[3]}"
        names[name] = renamed
    return names


class Reference:
    """The language model that `config` (plain data of a ModelConfig) and `weights` (its state dict) describe."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], training: bool) -> None:
        self.config, self.training = config, training
        names = plain_names(weights)
        self.weights = {names[name]: weight.detach().double() for name, weight in weights.items()}
        self.record = Record()
        self.inputs: dict[int, States] = {}
        """group -> the states at its entrance."""
        self.forced: Sequence[int] | None = None
        """Recursions of the token at each position, where the caller fixes them; known to `halting` alone."""
        schedule, attention = config["schedule"], config["attention"]
        layers = schedule["core"] or schedule["layers"]
        self.prelude = schedule["prelude"] or 0
        self.coda = schedule["coda"] or 0
        self.core = layers
        self.recursions = schedule["recursions"]
        blocks = range(self.prelude, self.prelude + layers)
        self.groups = [[block] for block in blocks] if schedule["sharing"] == "sequence" else [list(blocks)]
        self.heads = attention["heads"]
        self.kv_heads = attention["kv_heads"] or self.heads
        self.head_dim = attention["head_dim"] or config["d_model"] // self.heads
        self.scale = attention["scale"] or 1 / math.sqrt(self.head_dim)
        self.base, self.eps = attention["rope_base"], config["norm_eps"]
        self.scaling = attention["rope_scaling"]

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits [T, V] of one sequence."""
        embedding = self.weights["embedding.weight"]
        factor = math.sqrt(self.config["d_model"]) if self.config["embedding_scale"] else 1.0
        states = {t: factor * embedding[token] for t, token in enumerate(tokens)}
        if "position_embedding.weight" in self.weights:
            states = {t: x + self.weights["position_embedding.weight"][t] for t, x in states.items()}
        for block in range(self.prelude):
            states, _ = self.block(block, block, states)
        for index, group in enumerate(self.groups):
            states = self.group(index, group, states)
        first = self.prelude + self.core
        for block in range(first, first + self.coda):
            states, _ = self.block(block, block + (self.recursions - 1) * self.core, states)
        head = self.weights.get("head.weight", embedding)
        logits = torch.stack([head @ self.norm("norm", states[t]) for t in range(len(tokens))])
        cap = self.config["logit_cap"]
        return logits if cap is None else cap * torch.tanh(logits / cap)

    # Blocks

    def block(
        self, index: int, place: int, states: States, sources: States | None = None, step: Place = (0, 0, 0)
    ) -> tuple[States, States]:
        """One block over the states given, as the step at this place, from 0.

        Keys and values come from `sources` (normed states) where given; under `refresh` with the block's own on top of
        them. Returns the new states and the normed states from which this block's own keys and values are made.
        """
        group, recursion, member = step
        name = f"stack.blocks.{index}."
        norms = f"stack.groups.{group}.norms.{recursion - 1}.{member}." if recursion else name
        norms = norms if f"{norms}norm1.weight" in self.weights else name
        scale = 1 / self.recursions if recursion and self.config["residual_scale"] == "recursions" else 1.0
        normed = {t: self.norm(norms + "norm1", x) for t, x in states.items()}
        if self.config["kv"] == "refresh" and sources is not None:
            assert self.config["lora"] is None, "every key would need the change of its own recursion"
            sources = {**sources, **normed}
        own = self.below(name + "attention.")
        for part in "qkvo":
            maker = 1 if part in "kv" and sources is not None else recursion
            own[part + ".weight"] = self.relaxed(own[part + ".weight"], part, (group, maker, member))
        attended = self.attention(normed, normed if sources is None else sources, own, place)
        states = {t: self.join(norms + "norm1_after", x, attended[t], scale) for t, x in states.items()}
        mixed = self.mixer(index, {t: self.norm(norms + "norm2", x) for t, x in states.items()}, step)
        joined = {t: self.join(norms + "norm2_after", x, mixed[t], scale) for t, x in states.items()}
        return joined, normed if sources is None else sources

    def below(self, name: str) -> dict[str, Tensor]:
        """The weights whose names begin so, by the rest of their names."""
        return {full.removeprefix(name): weight for full, weight in self.weights.items() if full.startswith(name)}

    def relaxed(self, weight: Tensor, part: str, step: Place) -> Tensor:
        """W + alpha / rank * B A, at a step that has A and B for this map."""
        group, recursion, member = step
        own = self.below(f"stack.groups.{group}.lora.{recursion - 1}.{member}.{part}.")
        if not recursion or not own:
            return weight
        options = self.config["lora"]
        return weight + (options["alpha"] or options["rank"]) / options["rank"] * (own["b"] @ own["a"])

    def norm(self, name: str, x: Tensor, own: Mapping[str, Tensor] | None = None) -> Tensor:
        """The norm of this name, of the config's kind, out of all weights or the ones given."""
        weights = self.weights if own is None else own
        weight = weights[name + ".weight"]
        if self.config["norm"] == "layer":
            centred = x - sum(x.tolist()) / len(x)
            return rms_norm(centred, weight, self.eps) + weights[name + ".bias"]
        return rms_norm(x, 1 + weight if self.config["norm"] == "rms_plus_one" else weight, self.eps)

    def join(self, name: str, x: Tensor, branch: Tensor, scale: float) -> Tensor:
        """The residual stream with a branch, and the norm of this name where the config puts it."""
        match self.config["norm_placement"]:
            case "pre":
                return x + scale * branch
            case "sandwich":
                return self.norm(name, x + scale * branch)
            case _:
                return x + scale * self.norm(name, branch)

    def attention(
        self, queries: States, sources: States, own: Mapping[str, Tensor], place: int | None = None
    ) -> States:
        """Attention with the weights `own`, by their names below the attention, of a step or of an expert."""
        options, scaling, base, window = self.config["attention"], self.scaling, self.base, None
        every = options["global_every"]
        if options["window"] and place is not None and not (every and (place + 1) % every == 0):
            window = options["window"]
            if options["local_rope_base"]:
                base, scaling = options["local_rope_base"], None

        def linear(part: str, x: Tensor) -> Tensor:
            y = own[part + ".weight"] @ x
            return y + own[part + ".bias"] if part + ".bias" in own else y

        def heads(part: str, x: Tensor, count: int, position: int) -> list[Tensor]:
            y = linear(part, x)
            parts = [y[h * self.head_dim : (h + 1) * self.head_dim] for h in range(count)]
            if f"norm_{part}.weight" in own:
                parts = [self.norm(f"norm_{part}", head, own) for head in parts]
            turns = part != "v" and options["positions"] == "rope"
            return [rotate(head, position, base, scaling) for head in parts] if turns else parts

        keys = {s: heads("k", x, self.kv_heads, s) for s, x in sources.items()}
        values = {s: heads("v", x, self.kv_heads, s) for s, x in sources.items()}
        result = {}
        for t, x in queries.items():
            seen = [s for s in sorted(sources) if s <= t and (window is None or t - s < window)]
            outputs = []
            for h, query in enumerate(heads("q", x, self.heads, t)):
                shared = h // (self.heads // self.kv_heads)
                weights = softmax([self.scale * float(query @ keys[s][shared]) for s in seen])
                outputs.append(sum((w * values[s][shared] for w, s in zip(weights, seen, strict=True))))
            result[t] = linear("o", torch.cat([torch.as_tensor(output) for output in outputs]))
        return result

    # Mixers

    def mixer(self, index: int, inputs: States, step: Place) -> States:
        mixer, name = self.config["mixer"], f"stack.blocks.{index}.mixer."
        kind = mixer["kind"]
        if kind in ("swiglu", "geglu", "gelu", "relu"):
            up, down = self.weights[name + "up.weight"], self.weights[name + "down.weight"]
            gate = self.weights.get(name + "gate.weight")
            up, down = self.relaxed(up, "up", step), self.relaxed(down, "down", step)
            gate = None if gate is None else self.relaxed(gate, "gate", step)
            return {t: feed_forward(kind, x, up, down, gate) for t, x in inputs.items()}
        chosen = {t: self.choose_experts(index, name, x) for t, x in inputs.items()}
        outputs = {t: torch.zeros_like(x) for t, x in inputs.items()}
        for expert in range(mixer["router"]["experts"]):
            visitors = {t: x for t, x in inputs.items() if expert in chosen[t]}
            run = self.recursive_expert if kind == "recursive" else self.feed_forward_expert
            for t, y in run(name, expert, visitors).items():
                outputs[t] = outputs[t] + chosen[t][expert] * y
        return outputs

    def choose_experts(self, index: int, name: str, x: Tensor) -> dict[int, float]:
        """Expert -> weight."""
        router = self.config["mixer"]["router"]
        logits = (self.weights[name + "router.weight"] @ x).tolist()
        probabilities = softmax(logits)
        bias = self.weights.get(name + "router.bias", torch.zeros(len(logits))).tolist()
        chosen = best([p + b for p, b in zip(probabilities, bias, strict=True)], router["top_k"])
        self.record.experts.setdefault(index, []).append((chosen, probabilities, logits))
        total = sum(probabilities[e] for e in chosen) if router["top_k"] > 1 else 1.0
        return {e: probabilities[e] / total for e in chosen}

    def feed_forward_expert(self, name: str, expert: int, visitors: States) -> States:
        up, down = self.weights[name + "up"][expert], self.weights[name + "down"][expert]
        gate = self.weights[name + "gate"][expert] if name + "gate" in self.weights else None
        kind = self.config["mixer"]["expert"]["kind"]
        return {t: feed_forward(kind, x, up, down, gate) for t, x in visitors.items()}

    def recursive_expert(self, name: str, expert: int, visitors: States) -> States:
        mixer = self.config["mixer"]

        def own(part: str) -> Tensor:
            return self.weights[name + part][expert]

        states = dict(visitors)
        for step in range(mixer["steps"]):
            states = {t: z + own("step_embedding")[step] for t, z in states.items()}
            normed = {t: rms_norm(z, own("norm_attention"), self.eps) for t, z in states.items()}
            if mixer["attention_scope"] == "routed":
                attended = self.attention(normed, normed, {f"{part}.weight": own(part) for part in "qkvo"})
            else:
                attended = {t: self.look_at_oneself(z, own("v"), own("o")) for t, z in normed.items()}
            states = {t: z + attended[t] for t, z in states.items()}
            for t, z in states.items():
                normed_z = rms_norm(z, own("norm_mixer"), self.eps)
                states[t] = z + feed_forward("swiglu", normed_z, own("up"), own("down"), own("gate"))
        if mixer["branch"] == "output":
            return {t: rms_norm(z, own("norm_out"), self.eps) for t, z in states.items()}
        return {t: z - visitors[t] for t, z in states.items()}

    def look_at_oneself(self, x: Tensor, v: Tensor, o: Tensor) -> Tensor:
        """Attention whose only key is the query's own token: every head returns its value."""
        value, shared = v @ x, self.heads // self.kv_heads
        parts = [value[(h // shared) * self.head_dim : (h // shared + 1) * self.head_dim] for h in range(self.heads)]
        return o @ torch.cat(parts)

    # Depth

    def group(self, index: int, blocks: list[int], states: States) -> States:
        kind = self.config["depth"]["kind"]
        kept: dict[int, States] = {}
        self.inputs[index] = states
        if kind in ("fixed", "sampled"):
            if self.config["depth"].get("state") == "random":  # which it is not with a standard deviation of 0
                states = {t: torch.zeros_like(x) for t, x in states.items()}
            for recursion in range(1, self.recursions + 1):
                states = self.pass_core(index, blocks, recursion, states, kept)
            return states
        if kind == "token_choice":
            return self.token_choice(index, blocks, states)
        if kind == "halting":
            return self.halting(index, blocks, states)
        return self.gated(index, blocks, states, kept)

    def pass_core(
        self, index: int, blocks: list[int], recursion: int, states: States, kept: dict[int, States]
    ) -> States:
        """core(H) over the states given.

        `kept` holds the key sources of each block: those of recursion 1 for `shared_first`, of each token's latest
        visit for `refresh`.
        """
        given = self.inputs[index]
        if self.config["input_injection"] == "add":
            states = {t: x + given[t] for t, x in states.items()}
        elif self.config["input_injection"] == "concat":
            adapter = self.weights[f"stack.groups.{index}.injection.adapter"]
            states = {t: adapter @ torch.cat([x, given[t]]) for t, x in states.items()}
        name = f"stack.groups.{index}.step_embedding"
        if name in self.weights:
            states = {t: x + self.weights[name][recursion - 1] for t, x in states.items()}
        for member, block in enumerate(blocks):
            earlier = None if self.config["kv"] == "per_recursion" else kept.get(block)
            core = self.recursions * (block - self.prelude) + recursion - 1
            if self.config["schedule"]["sharing"] != "sequence":
                core = self.core * (recursion - 1) + block - self.prelude
            step = (index, recursion, member)
            states, sources = self.block(block, self.prelude + core, states, earlier, step)
            if self.config["kv"] == "refresh":
                kept[block] = sources
            kept.setdefault(block, sources)
        return states

    def scores(self, index: int, recursion: int, x: Tensor, scorer: str = "score") -> list[float]:
        """Outputs of the scorer of one recursion (or of the only one) for one state."""
        name = f"stack.groups.{index}.router.{scorer}."
        if f"{name}{recursion - 1}.weight" in self.weights:
            name += f"{recursion - 1}."
        if name + "weight" not in self.weights:  # an unweighted router where all go on
            return [0.0]
        hidden = x if name + "hidden" not in self.weights else gelu(self.weights[name + "hidden"] @ x)
        return (self.weights[name + "weight"] @ hidden).tolist()

    def gated(self, index: int, blocks: list[int], states: States, kept: dict[int, States]) -> States:
        depth, count = self.config["depth"], len(states)
        capacities = depth["capacities"] or [(self.recursions - r) / self.recursions for r in range(self.recursions)]
        active = sorted(states)
        for recursion in range(1, self.recursions + 1):
            share = capacities[recursion - 1]
            before = 1.0 if recursion == 1 else capacities[recursion - 2]
            candidates = active if depth.get("hierarchical", True) else sorted(states)
            logits = {t: self.scores(index, recursion, states[t])[0] for t in candidates}
            if depth["kind"] == "threshold":
                border = self.weights[f"stack.groups.{index}.router.threshold"][recursion - 1].item()
                active = [t for t in candidates if logits[t] > (border if share < before else -math.inf)]
            elif share == 1:
                active = candidates
            elif self.training:
                room = max(1, math.floor(share * count))
                chosen = best([logits[t] for t in candidates], room)
                active = sorted(candidates[i] for i in chosen)
            else:
                active = [t for t in candidates if self.causal_logit(index, recursion, states[t], logits[t]) >= 0]
            self.record.candidates.setdefault((index, recursion), []).extend(
                (logits[t], t in active) for t in candidates
            )
            if active:
                passed = self.pass_core(index, blocks, recursion, {t: states[t] for t in active}, kept)
                states = states | {t: self.update(states[t], passed[t], logits[t]) for t in active}
        return states

    def causal_logit(self, index: int, recursion: int, x: Tensor, logit: float) -> float:
        """The logit whose sign decides in inference: the router's own, or the predictor's."""
        if self.config["depth"]["causal"] != "aux_router":
            return logit
        return self.scores(index, recursion, x, "predictor")[0]

    def update(self, x: Tensor, passed: Tensor, logit: float) -> Tensor:
        depth = self.config["depth"]
        match depth["score"]:
            case "sigmoid":
                gate = depth["alpha"] * sigmoid(logit)
            case "tanh":
                gate = depth["alpha"] * math.tanh(logit)
            case _:
                gate = 1.0
        return x + gate * (passed if depth["gate"] == "output" else passed - x)

    def token_choice(self, index: int, blocks: list[int], states: States) -> States:
        depth = self.config["depth"]
        alpha = depth["alpha"] or (1.0 if depth["score"] == "softmax" else 0.1)
        bias = self.weights.get(f"stack.groups.{index}.router.bias", torch.zeros(self.recursions)).tolist()
        scores, taken = {}, {}
        for t, x in states.items():
            logits = [logit / depth["temperature"] for logit in self.scores(index, 1, x)]
            scores[t] = softmax(logits) if depth["score"] == "softmax" else [sigmoid(logit) for logit in logits]
            taken[t] = 1 + best([s + b for s, b in zip(scores[t], bias, strict=True)], 1)[0]
            self.record.depths.setdefault(index, []).append((taken[t], scores[t], logits))
        moving, result = dict(states), dict(states)
        kept: dict[int, States] = {}
        for recursion in range(1, self.recursions + 1):
            moving = {t: x for t, x in moving.items() if taken[t] >= recursion}
            if not moving:
                break
            moving = self.pass_core(index, blocks, recursion, moving, kept)
            if depth["gate"] == "each":
                moving = {t: alpha * scores[t][recursion - 1] * x for t, x in moving.items()}
            for t, x in moving.items():
                if taken[t] == recursion:
                    result[t] = states[t] + (x if depth["gate"] == "each" else alpha * scores[t][recursion - 1] * x)
        return result

    def halting(self, index: int, blocks: list[int], states: States) -> States:
        """Each token collects (weight, state) of its recursions; its output is their sum."""
        epsilon = self.config["depth"]["epsilon"]
        probabilities: dict[int, list[float]] = {t: [] for t in states}
        visited: dict[int, list[Tensor]] = {t: [] for t in states}
        running, result = dict(states), {}
        kept: dict[int, States] = {}
        for recursion in range(1, self.recursions + 1):
            running = self.pass_core(index, blocks, recursion, running, kept) if running else {}
            for t in list(running):
                visited[t].append(running[t])
                p = sigmoid(self.halting_logit(index, running[t]))
                goes_on = recursion < self.recursions and sum(probabilities[t]) + p < 1 - epsilon
                if self.forced is not None:
                    goes_on = recursion < self.forced[t]
                    p = min(p, 1 - sum(probabilities[t]))
                if goes_on:
                    probabilities[t].append(p)
                    continue
                remainder = 1 - sum(probabilities[t])
                weights = [*probabilities[t], remainder]
                self.record.halted.setdefault(index, []).append((recursion, remainder))
                result[t] = sum((w * h for w, h in zip(weights, visited[t], strict=True)), torch.zeros_like(states[t]))
                del running[t]
        return result

    def halting_logit(self, index: int, x: Tensor) -> float:
        name = f"stack.groups.{index}.router."
        return float(self.weights[name + "score.weight"][0] @ x) + self.weights[name + "bias"].item()

    # Auxiliary losses of everything that this reference has seen

    def ponder(self, group: int) -> float:
        """Mean of recursions taken plus remainder."""
        seen = self.record.halted[group]
        return sum(taken + remainder for taken, remainder in seen) / len(seen)

    def binary_cross_entropy(self) -> dict[tuple[int, int], float]:
        """(group, recursion) -> mean cross-entropy of the candidates' logits against being active."""
        means = {}
        for place, seen in self.record.candidates.items():
            losses = [-math.log(sigmoid(logit) if active else sigmoid(-logit)) for logit, active in seen]
            means[place] = sum(losses) / len(losses)
        return means

    def squared_logits(self) -> dict[tuple[int, int], float]:
        """(group, recursion) -> mean squared logit of the candidates."""
        return {
            place: sum(logit * logit for logit, _ in seen) / len(seen) for place, seen in self.record.candidates.items()
        }

    def depth_balance(self, group: int) -> float:
        """R * sum of f_i P_i: share of tokens that choose depth i, times the mean of its share of a token's scores."""
        seen = self.record.depths[group]
        total = 0.0
        for i in range(self.recursions):
            share = sum(taken == i + 1 for taken, _, _ in seen) / len(seen)
            # P_i is a probability. Sigmoid scores do not sum to 1: taken as they are, the loss would fall when all
            # scores go to 0, and nothing would be balanced (DeepSeek-V3, 2.1.2, divides alike). A softmax sums to 1.
            total += share * sum(scores[i] / sum(scores) for _, scores, _ in seen) / len(seen)
        return self.recursions * total

    def depth_z(self, group: int) -> float:
        """Mean squared logsumexp of the depth logits."""
        seen = self.record.depths[group]
        return sum(math.log(sum(math.exp(logit) for logit in logits)) ** 2 for _, _, logits in seen) / len(seen)

    def expert_balance(self, block: int) -> float:
        """E * sum of load * importance: share of the assignments, times the mean probability."""
        seen, router = self.record.experts[block], self.config["mixer"]["router"]
        total = 0.0
        for e in range(router["experts"]):
            load = sum(e in chosen for chosen, _, _ in seen) / (len(seen) * router["top_k"])
            total += load * sum(probabilities[e] for _, probabilities, _ in seen) / len(seen)
        return float(router["experts"] * total)

    def expert_z(self, block: int) -> float:
        """Mean squared logsumexp of the expert logits."""
        seen = self.record.experts[block]
        return sum(math.log(sum(math.exp(logit) for logit in logits)) ** 2 for _, _, logits in seen) / len(seen)
