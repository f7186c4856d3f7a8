"""Against the models of Hugging Face's transformers: the same weights give the same logits, with our cache too."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import morex
from morex.config import ModelConfig
from morex.loading import validate
from parity.helpers import largest_change, pad

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# What all cases have in common; what differs stands in each.
OURS: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "max_seq_len": 128,
    "mixer": {"kind": "swiglu", "d_ff": 48},
    "schedule": {"layers": 4},
}
NAMES = {
    r"model\.embed_tokens\.": "embedding.",
    r"model\.norm\.": "norm.",
    r"lm_head\.": "head.",
    r"model\.layers\.": "stack.core.blocks.",
    r"self_attn\.([qkvo])_proj\.": r"attention.\1.",
    r"self_attn\.([qk])_norm\.": r"attention.norm_\1.",
    r"mlp\.(gate|up|down)_proj\.": r"mixer.\1.",
    r"input_layernorm\.": "norm1.",
}
PRE = {r"post_attention_layernorm\.": "norm2."}
PRE_POST = {
    r"post_attention_layernorm\.": "norm1_after.",
    r"pre_feedforward_layernorm\.": "norm2.",
    r"post_feedforward_layernorm\.": "norm2_after.",
}


def hf() -> Any:
    """The package, imported when a test runs: it takes seconds, which other tests need not wait for."""
    import transformers

    return transformers


def llama() -> tuple[Any, dict[str, Any]]:
    theirs = hf().LlamaConfig(
        **SIZES,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    attention = {"heads": 4, "kv_heads": 2, "rope_base": 5e5}
    return hf().LlamaForCausalLM(theirs), {"attention": attention, "norm_eps": 1e-5, "tie_embeddings": False}


def scaled_llama() -> tuple[Any, dict[str, Any]]:
    """Llama 3.1: rope scaling; and with biases on all four projections."""
    rope = {"rope_type": "llama3", "rope_theta": 100.0, "original_max_position_embeddings": 64, **LLAMA3}
    theirs = hf().LlamaConfig(
        **SIZES, head_dim=16, rms_norm_eps=1e-5, attention_bias=True, tie_word_embeddings=True, rope_parameters=rope
    )
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 16, "rope_base": 100.0, "bias": True, "output_bias": True}
    attention |= {"rope_scaling": {"original_max_seq_len": 64, **LLAMA3}}
    return hf().LlamaForCausalLM(theirs), {"attention": attention, "norm_eps": 1e-5}


def qwen3() -> tuple[Any, dict[str, Any]]:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    theirs = hf().Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True, rope_parameters=rope)
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 12, "rope_base": 1e6, "qk_norm": True}
    return hf().Qwen3ForCausalLM(theirs), {"attention": attention}


def gemma3() -> tuple[Any, dict[str, Any]]:
    """Text layers, one in three global, and a cap on the logits."""
    theirs = hf().Gemma3TextConfig(
        **SIZES,
        head_dim=12,
        query_pre_attn_scalar=20,
        sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=3.0,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    )
    attention: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 12, "scale": 20**-0.5, "qk_norm": True}
    attention |= {"window": 5, "global_every": 3, "rope_base": 1e6, "local_rope_base": 50.0}
    return hf().Gemma3ForCausalLM(theirs), {
        "attention": attention,
        "mixer": {"kind": "geglu", "d_ff": 48},
        "norm": "rms_plus_one",
        "norm_placement": "pre_post",
        "embedding_scale": True,
        "logit_cap": 3.0,
    }


FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "llama": llama,
    "llama 3.1 with biases": scaled_llama,
    "qwen3": qwen3,
    "gemma3": gemma3,
}


def both(family: str) -> tuple[Any, Any]:
    """Their model with random weights, norms and biases included, and ours with the same ones."""
    theirs, options = FAMILIES[family]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    ours: Any = morex.build_model(validate(ModelConfig, OURS | options))
    ours.load_state_dict(renamed(theirs), strict=True)
    return theirs.eval(), ours.eval()


def renamed(theirs: Any) -> dict[str, torch.Tensor]:
    """Their weights under our names."""
    names = NAMES | (PRE_POST if theirs.config.model_type == "gemma3_text" else PRE)
    weights = {}
    for name, weight in theirs.state_dict().items():
        for pattern, plain in names.items():
            name = re.sub(pattern, plain, name)
        if name != "head.weight" or not theirs.config.tie_word_embeddings:
            weights[name] = weight
    return weights


def sequences(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(97, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    """A ragged batch whose longest row is several windows long."""
    theirs, ours = both(family)
    tokens, lengths = pad(sequences([40, 23, 3]))
    real = torch.arange(40) < lengths[:, None]
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=real.long()).logits[real]
        found = ours(tokens, lengths=lengths).logits[real]
    assert expected.std() > 0.1, "logits that are all alike would agree whatever the formula"
    assert largest_change(found, expected) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_are_those_of_transformers(family: str) -> None:
    """Fed in chunks through our cache: a prompt, single tokens, a longer piece."""
    theirs, ours = both(family)
    tokens = torch.stack(sequences([40, 40]))
    with torch.no_grad():
        expected = theirs(tokens).logits
        cache = ours.new_cache(2)
        found = [ours(part, cache=cache).logits for part in tokens.split([9, 1, 1, 14, 1, 14], 1)]
    assert largest_change(torch.cat(found, 1), expected) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers(family: str) -> None:
    """Of the embedding, which every path of the loss ends in."""
    theirs, ours = both(family)
    tokens = torch.stack(sequences([20, 20]))
    theirs(tokens, labels=tokens).loss.backward()
    ours(tokens, labels=tokens).loss.backward()
    expected = theirs.get_input_embeddings().weight.grad
    assert largest_change(ours.embedding.weight.grad, expected) <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_as_many(family: str) -> None:
    theirs, ours = both(family)
    assert morex.count(ours.config).parameters == sum(parameter.numel() for parameter in theirs.parameters())


PUBLISHED: dict[str, Callable[[], Any]] = {
    "smollm2-135m": lambda: hf().LlamaForCausalLM(
        hf().LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    ),
    "gemma3-270m": lambda: hf().Gemma3ForCausalLM(
        hf().Gemma3TextConfig(
            vocab_size=262_144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
        )
    ),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_shapes_of_the_published_models(preset: str) -> None:
    """Every weight of theirs has its place in ours, at full size, on the meta device."""
    with torch.device("meta"):
        theirs = renamed(PUBLISHED[preset]())
    ours = morex.build_model(morex.load_config(preset).model, device="meta").state_dict()
    assert {name: tuple(weight.shape) for name, weight in ours.items()} == {
        name: tuple(weight.shape) for name, weight in theirs.items()
    }


def test_local_steps_of_gemma3_are_those_of_the_published_model() -> None:
    """Five steps in six see 512 tokens, by the pattern that transformers fills in."""
    kinds = hf().Gemma3TextConfig(num_hidden_layers=18).layer_types
    attention = morex.load_config("gemma3-270m").model.attention
    assert attention.window == 512 and attention.global_every is not None
    assert kinds is not None
    assert [kind == "full_attention" for kind in kinds] == [
        (step + 1) % attention.global_every == 0 for step in range(18)
    ]
