"""The model, and the only place where one is assembled from a config.

embed -> prelude -> core under a depth router -> coda -> norm -> head (language model or classifier)
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from morex.cache.batch import KVCache
from morex.cache.contiguous import ContiguousStore
from morex.cache.fixed import FixedCache
from morex.cache.paged import PagedStore, pages_within
from morex.cache.store import KVStore
from morex.config import ModelConfig, expect_model
from morex.depth.policy import Depth, DepthPolicy, parse_depth
from morex.depth.router import DepthRouter
from morex.depth.routers import ROUTERS
from morex.experts.kinds import EXPERTS
from morex.experts.router import ExpertRouter
from morex.model.checks import check_batch, check_below, check_exit, check_tensors, refuse_decoding
from morex.model.heads import ClassifierHead, Head, LanguageModelHead
from morex.model.init import initialise
from morex.model.stack import Core, RoutedGroup, Stack, Windows
from morex.model.trace import Trace, full_trace
from morex.nn.attention import Attention, AttentionShape, Local, attention_maps
from morex.nn.block import NORM_NAMES, Block
from morex.nn.dropout import dropped
from morex.nn.injection import Injection
from morex.nn.low_rank import LowRank
from morex.nn.mixers import FeedForward, GatedFeedForward, feed_forward_maps
from morex.nn.norm import NORMS
from morex.nn.packing import Packing, pack_batch
from morex.nn.rope import Rope, RopeScaling
from morex.nn.signals import RouterStats, loss_name
from morex.sections.head import ClassifierHeadConfig
from morex.sections.mixers import FeedForwardConfig


@dataclass
class Output:
    """Result of a forward pass."""

    logits: Tensor
    """[B, T, V], or the last `logits_to_keep` of each row; zeros at padding. Of a classifier [B, C]."""
    objective: str = "lm"
    """Name in `losses` of what the model learns: `lm`, or `classification` of a classifier."""
    loss: Tensor | None = None
    """The loss of the objective, plus the weighted auxiliary losses in training mode."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Raw losses by name: the objective's, and the routers' auxiliary losses, means over routers and recursions.

    `lm` is the cross-entropy of the next token under `logits`. Only where `exit_gate` trains is it the expectation over
    all exits; the one under `logits`, the exits that its rule takes, is `lm_at_exit` then.
    """
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Weight of each auxiliary loss in `loss`, after its warm-up where it has one."""
    stats: RouterStats = field(default_factory=RouterStats)
    """Router statistics by module path, for `update_routers`; none with a cache, which goes with decoding."""
    trace: Trace | None = None


class LanguageModel(nn.Module):
    """A causal language model with adaptive depth, or a classifier of sequences. Build it with `build_model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.attention.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model) if learned else None
        self.stack = _stack(config)
        self.norm = NORMS[config.norm](config.d_model, config.norm_eps)
        self.head = _head(config)
        mixer = config.mixer
        self._num_experts = 0 if isinstance(mixer, FeedForwardConfig) else mixer.router.experts
        self.loss_weights: dict[str, float] = {}
        self._warming: dict[str, DepthRouter | ExpertRouter] = {}
        for path, module in self.named_modules():
            if isinstance(module, DepthRouter | ExpertRouter):
                self.loss_weights |= {loss_name(path, name): weight for name, weight in module.loss_weights.items()}
                self._warming |= {loss_name(path, name): module for name in module.warming}

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | FixedCache | None = None,
        depth: Depth | Tensor = None,
        logits_to_keep: int | Tensor = 0,
        return_trace: bool = False,
        first_row: int = 0,
    ) -> Output:
        """Runs the model on a right-padded batch.

        Args:
            tokens: token ids [B, T].
            labels: the tokens themselves [B, T], or with the next one [B, T + 1]; shifted inside, -100 is ignored.
                For a classifier the class of each row [B].
            lengths: true lengths of the rows [B]; default: all T.
            positions: positions [B, T] for the position embedding; default: counted from 0, or from the cache.
            document_ids: [B, T]; tokens attend only to tokens of the same document.
            cache: keys and values of what came before; it takes in this call's.
            depth: who decides how deep tokens go: None the router, an integer, one for each row [B], 'uniform:N',
                'adaptive[:SPAN]', 'progressive[:SPAN]', 'exit[:RULE][:THRESHOLD]' (routers with exit rules), or
                'oracle' (top-k of `expert_choice` in eval mode, which sees later tokens).
            logits_to_keep: keep only the last so many logits of each row, or those at these places; 0 keeps all.
            return_trace: also return what every token did.
            first_row: number of the first row where other ranks have other rows of the batch; what training draws at
                random for a row is a function of its number and of one draw from torch's generator.

        Raises:
            ValueError: ids beyond the vocabulary, shapes that do not fit, a depth that this model cannot take.
        """
        check_tensors(tokens=tokens, labels=labels, lengths=lengths, positions=positions, document_ids=document_ids)
        check_batch(self.config, self.training, tokens, lengths, positions, document_ids, depth, cache)
        self.head.check(labels, (tokens.shape[0], tokens.shape[1]), logits_to_keep)
        policy = self.policy(depth, cache)
        start = None if cache is None else cache.seen
        shape = (tokens.shape[0], tokens.shape[1])
        packing = pack_batch(shape, tokens.device, lengths, start, positions, document_ids, first_row)
        x = self.embed(tokens, packing)
        x, record = self.stack(x, packing, policy, cache, return_trace, self.read if policy.kind == "exit" else None)
        if cache is not None:
            cache.advance(packing)
        place = (packing, tokens.shape[1], self.embedding.weight)
        if labels is not None and record.exits is not None:
            assert isinstance(self.head, LanguageModelHead)
            logits, losses = self.head.read_exits(record.exits, self.norm, *place, labels, logits_to_keep)
        else:
            logits, loss = self.head(self.norm(x), *place, labels, logits_to_keep)
            losses = {} if loss is None else {self.head.objective: loss}
        out = Output(logits, self.head.objective, stats=record.stats, loss_weights=dict(self.loss_weights))
        out.losses = losses | {name: torch.stack(values).mean() for name, values in record.losses.items()}
        if losses:
            out.loss = self._weighted(out)
        if return_trace:
            out.trace = full_trace(record.groups, record.choices, tokens, self._num_experts)
        return out

    def new_cache(self, batch_size: int, room: int = 64, store: KVStore | None = None) -> KVCache:
        """An empty cache for `batch_size` sequences.

        Args:
            room: entries of a sequence that are set aside at first.
            store: where they are kept; default: a contiguous store of their own.

        Raises:
            ValueError: a classifier, which does not decode.
        """
        refuse_decoding(self.config, "a cache")
        if store is None:
            store = ContiguousStore(batch_size, room, self.embedding.weight.device)
        return KVCache(store, [store.open() for _ in range(batch_size)], self.config.schedule.resolved)

    def new_store(self, cache_bytes: int, page_size: int = 16, dtype: torch.dtype | None = None) -> PagedStore:
        """A paged store for many sequences within a fixed amount of memory.

        Args:
            cache_bytes: of all keys and values together.
            page_size: entries of a page.
            dtype: of keys and values; default: that of the weights.

        Raises:
            ValueError: a classifier, which does not decode, or bytes that hold not one page.
        """
        refuse_decoding(self.config, "a cache")
        shape, weight = attention_shape(self.config), self.embedding.weight
        dtype = dtype or weight.dtype
        entry_bytes = 2 * shape.kv_heads * shape.head_dim * dtype.itemsize
        pages = pages_within(cache_bytes, page_size, entry_bytes)
        return PagedStore(pages, page_size, shape.kv_heads, shape.head_dim, dtype, weight.device)

    @torch.no_grad()
    def update_routers(self, stats: RouterStats, step: int) -> None:
        """Moves router biases, thresholds and warm-ups.

        Args:
            stats: `Output.stats`, summed over the microbatches and ranks of one optimizer step.
            step: optimizer steps taken so far, this one included.
        """
        for name, module in self.named_modules():
            if isinstance(module, DepthRouter | ExpertRouter) and name in stats:
                module.update(stats[name], step)

    def generate(self, tokens: Tensor | list[list[int]], **options: Any) -> Tensor | list[list[int]]:
        """Continues prompts; see `morex.model.generate.generate`."""
        from morex.model.generate import generate

        return generate(self, tokens, **options)

    def embed(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Tokens [B, T] -> the residual stream of the real ones [N, D]."""
        x: Tensor = self.embedding(packing.gather(tokens.flatten()))
        if self.config.embedding_scale:
            x = x * self.config.d_model**0.5
        if self.position_embedding is not None:
            most = self.config.max_seq_len
            check_below(most, "position", packing.positions, f"the {most} learned positions (model.max_seq_len)")
            x = x + self.position_embedding(packing.positions)
        return dropped(x, self.config.dropout.embedding, self.training)

    def _weighted(self, out: Output) -> Tensor:
        """The loss of the objective, in training with the auxiliary losses."""
        loss = out.losses[out.objective]
        if self.training:
            for name, weight in self.loss_weights.items():
                if name in out.losses:
                    own = weight * out.losses[name]
                    loss = loss + (own * self._warming[name].warmth[0] if name in self._warming else own)
        return loss

    def read(self, x: Tensor) -> Tensor:
        """States [N, D] before the last norm -> logits of the next token [N, V]."""
        assert isinstance(self.head, LanguageModelHead)
        return self.head.logits(self.norm(x), self.embedding.weight)

    def policy(self, depth: Depth | Tensor, cache: KVCache | FixedCache | None) -> DepthPolicy:
        router = self.stack.core.groups[0].router
        assert isinstance(router, DepthRouter)
        any_depth = takes_any_depth(self.config)
        recursions, span = self.config.schedule.recursions, self.config.max_seq_len
        policy = parse_depth(depth, recursions, span, any_depth, router.exit_rules)
        if policy.kind == "exit":
            check_exit(self.config, self.training, policy, f"depth {depth!r}")
        chooses = self.config.depth.kind == "expert_choice"
        if policy.kind == "oracle" and not chooses:
            raise ValueError(f"depth 'oracle' is for expert_choice; this model's router is {self.config.depth.kind!r}")
        if policy.kind == "oracle" and cache is not None:
            raise ValueError("depth 'oracle' sees later tokens, so it cannot decode with a cache; leave depth out")
        if policy.kind == "router" and not router.is_causal and not self.training:
            raise ValueError(
                "this router was trained with depth.causal 'none' and has no causal rule; pass depth='oracle' or a "
                "fixed depth, or train with depth.causal 'aux_loss'"
            )
        return router.settle(policy)


def takes_any_depth(config: ModelConfig) -> bool:
    """Whether more recursions than R make sense: nothing in the model belongs to one recursion."""
    return ROUTERS[config.depth.kind].any_depth and not config.recursions_differ


def build_model(
    config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """Builds a model with weights drawn from `config.seed`, the same on every device.

    Args:
        config: what to build.
        device: where; `meta` builds shapes alone, for counting.
        dtype: of the weights; default float32.

    Raises:
        TypeError: `config` is no ModelConfig.
    """
    expect_model(config)
    with torch.device(device):
        model = LanguageModel(config)
    if torch.device(device).type != "meta":
        depth = config.schedule.resolved.unrolled_depth
        initialise(model, config.init_std, config.init, depth, config.seed, config.width_ratio)
    return model.to(dtype=dtype) if dtype is not None else model


def _stack(config: ModelConfig) -> Stack:
    schedule = config.schedule.resolved
    core_blocks = [_block(config, not config.recursion_norms) for _ in range(schedule.core)]
    core = Core(core_blocks, [_group(config, len(group.recursions[0])) for group in schedule.groups], schedule)
    prelude, coda = ([_block(config) for _ in range(count)] for count in (schedule.prelude, schedule.coda))
    return Stack(prelude, core, coda, config.kv, _windows(config))


def _head(config: ModelConfig) -> Head:
    head, d_model, scale = config.head, config.d_model, 1 / config.width_ratio
    if isinstance(head, ClassifierHeadConfig):
        return ClassifierHead(d_model, head.classes, head.pooling, config.logit_cap, scale)
    return LanguageModelHead(d_model, config.vocab_size, config.tie_embeddings, config.logit_cap, scale)


def _windows(config: ModelConfig) -> Windows | None:
    attention, rope = config.attention, attention_shape(config).rope
    if attention.window is None:
        return None
    if attention.local_rope_base is not None:
        rope = Rope(attention.local_rope_base)
    return Windows(Local(attention.window, rope), attention.global_every)


def _group(config: ModelConfig, blocks: int) -> RoutedGroup:
    recursions = config.schedule.recursions
    router = ROUTERS[config.depth.kind](config.d_model, recursions, **config.depth.options(recursions))
    embedding = nn.Parameter(torch.empty(recursions, config.d_model)) if config.step_embedding else None
    injection = None if config.input_injection == "none" else Injection(config.d_model, config.input_injection)
    scale = 1 / recursions if config.residual_scale == "recursions" else 1.0
    norms = lora = None
    if config.recursion_norms:
        norms = [[_norms(config) for _ in range(blocks)] for _ in range(recursions)]
    if config.lora is not None:
        rank, alpha = config.lora.rank, config.lora.factor
        maps = [lora_maps(config, r) for r in range(1, recursions + 1)]
        lora = [
            [{name: LowRank(*sizes, rank, alpha) for name, sizes in own.items()} for _ in range(blocks)] for own in maps
        ]
    return RoutedGroup(router, embedding, injection, scale, norms, lora)


def lora_maps(config: ModelConfig, r: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear maps of a core block that have a low-rank change at recursion r, by name."""
    mixer = config.mixer
    assert isinstance(mixer, FeedForwardConfig), "experts have no such changes"
    maps = attention_maps(config.d_model, attention_shape(config))
    if config.kv == "shared_first" and r > 1:
        del maps["k"], maps["v"]  # keys and values are those of recursion 1
    return maps | feed_forward_maps(mixer.kind, config.d_model, mixer.hidden(config.d_model))


def _norms(config: ModelConfig) -> dict[str, nn.Module]:
    """The norms of one block, by its names for them."""
    names = NORM_NAMES if config.norm_placement != "pre" else NORM_NAMES[:2]
    return {name: NORMS[config.norm](config.d_model, config.norm_eps) for name in names}


def attention_shape(config: ModelConfig) -> AttentionShape:
    """Sizes and rotation of the attention in every block, and in experts."""
    attention = config.attention
    scaling = attention.rope_scaling
    stretch = None if scaling is None else RopeScaling(**scaling.model_dump(exclude={"kind"}))
    rope = Rope(attention.rope_base, stretch) if attention.positions == "rope" else None
    options = attention.options(config.d_model)
    if config.width_scaling is not None and attention.scale is None:
        options["scale"] = config.width_scaling.attention_scale(options["head_dim"])
    return AttentionShape(rope=rope, **options)


def _block(config: ModelConfig, has_norms: bool = True) -> Block:
    d_model, eps, mixer = config.d_model, config.norm_eps, config.mixer
    shape = attention_shape(config)
    built: nn.Module
    if isinstance(mixer, FeedForwardConfig):
        hidden = mixer.hidden(d_model)
        built = (GatedFeedForward if mixer.is_gated else FeedForward)(d_model, hidden, mixer.kind)
    else:
        router = ExpertRouter(d_model, **mixer.router.model_dump())
        parts: dict[str, Any] = {}
        if (own := mixer.steps_router) is not None:
            parts["depth"] = ROUTERS[own.kind](d_model, mixer.num_steps, **own.options(mixer.num_steps))
        built = EXPERTS[mixer.kind](d_model, router, shape, eps, **parts, **mixer.options(d_model))
    norm_q, norm_k = (NORMS[config.norm](shape.head_dim, eps) if config.attention.qk_norm else None for _ in "qk")
    attention = Attention(d_model, shape, norm_q, norm_k, config.dropout.attention)
    norms = _norms(config) if has_norms else {}
    return Block(attention, built, config.norm_placement, norms, config.dropout.residual)
