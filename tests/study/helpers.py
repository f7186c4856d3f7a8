"""What the study tests share: made-up results whose sentences can be worked out by hand, and a tiny real study."""

from pathlib import Path
from typing import Any

from morex.config import Config
from morex.loading import load_config
from morex.study.plan import Plan, PlannedVariant
from morex.study.records import (
    Cell,
    DepthMap,
    Evaluation,
    Kind,
    Measures,
    Results,
    Routing,
    Sample,
    Summary,
    TrainingPoint,
)
from morex.study.results import summarise
from morex.study.spec import StudyConfig

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away", "from", "all"]
TWIN_KEYS = ("twin_of", "twin", "unrouted")


def variant(name: str, kind: Kind, loss: float | tuple[float, ...], **numbers: Any) -> dict[str, Any]:
    """A made-up variant; `loss` is its held-out loss, one per seed. Numbers have round defaults.

    Args:
        numbers: parameters, flops (training FLOPs per token), tokens, speed (tokens/s), oracle, histogram, load, text,
            and twin_of, twin, unrouted.
    """
    return {"name": name, "kind": kind, "loss": loss if isinstance(loss, tuple) else (loss,), **numbers}


def make_results(*variants: dict[str, Any], **study: Any) -> Results:
    """Results of made-up variants: every cell has five evaluations on a straight line down to its loss."""
    seeds = len(variants[0]["loss"])
    config = StudyConfig(
        **{
            "name": "made-up",
            "variants": tuple(
                {"name": v["name"], **{key: v[key] for key in ("twin_of", "twin") if key in v}} for v in variants
            ),
            "seeds": tuple(range(seeds)),
            "budget": {"kind": "tokens", "value": 1000},
        }
        | study
    )
    base = load_config("vanilla")
    planned = tuple(planned_variant(v, base) for v in variants)
    cells = [cell(v, seed) for seed in range(seeds) for v in variants]
    machine = {"device_name": "A <fast> CPU", "threads": 2, "versions": {"torch": "2.13.0"}}
    return summarise(config, Plan(planned, (), planned[0].name), cells, machine, "morex compare made-up.yaml")


def planned_variant(made: dict[str, Any], base: Config) -> PlannedVariant:
    return PlannedVariant(made["name"], base, made["kind"], made.get("twin_of"), made.get("twin"), made.get("unrouted"))


def cell(made: dict[str, Any], seed: int) -> Cell:
    """One made-up training: 1,000 tokens in 100 steps unless told otherwise."""
    loss, flops = made["loss"][seed], made.get("flops", 1e6)
    tokens, speed = made.get("tokens", 1000), made.get("speed", 100.0)
    oracle = made.get("oracle")
    evaluations = [
        Evaluation(
            step=20 * i,
            tokens=tokens * i // 5,
            seconds=tokens * i / 5 / speed,
            flops=flops * tokens * i / 5,
            val_loss=loss + 0.5 * (5 - i),
            val_loss_oracle=None if oracle is None else oracle + 0.5 * (5 - i),
        )
        for i in range(1, 6)
    ]
    training = [
        TrainingPoint(
            step=i,
            tokens=tokens * i // 100,
            seconds=tokens * i / 100 / speed,
            flops=flops * tokens * i / 100,
            loss=loss + 3 - 0.03 * i,
        )
        for i in range(1, 101)
    ]
    histogram = made.get("histogram")
    routing = None
    if histogram is not None or "load" in made:
        routing = Routing(
            tokens=sum(histogram or (100,)),
            deepest=len(histogram) - 1 if histogram else 0,
            histogram=histogram,
            depth_map=DepthMap(tokens=("One", " <two>", "\nthree"), depths=(1, 2, 1)) if histogram else None,
            expert_load={f"stack.blocks.{i}.mixer.router": load for i, load in enumerate(made.get("load", ()))},
        )
    return Cell(
        name=f"{made['name']}-s{seed}",
        variant=made["name"],
        seed=seed,
        lr=1e-3,
        status="finished",
        summary=Summary(
            steps=100,
            tokens=tokens,
            seconds=tokens / speed,
            train_flops=flops * tokens,
            final_train_loss=loss - 0.1,
            val_loss=loss,
            val_loss_oracle=oracle,
            bits_per_byte=1.5,
            tokens_per_s=speed,
            peak_memory_bytes=200_000_000,
            parameters=made.get("parameters", 1_000_000) + 500,
            unique_non_embedding=made.get("parameters", 1_000_000),
            train_flops_per_token=flops,
            decode_flops_per_token=flops / 3,
            kv_bytes_per_token=4096,
        ),
        measures=Measures(
            decode_tokens_per_s=50.0,
            sample=Sample(prompt="Once ", text=made.get("text", "upon a time.")),
            routing=routing,
        ),
        evaluations=tuple(evaluations),
        training=tuple(training),
    )


def family() -> Results:
    """One variant of each kind, three seeds."""
    return make_results(
        variant("dense", "dense", (2.00, 2.01, 2.02), parameters=2_000_000),
        variant("small", "dense", (2.30, 2.31, 2.32), flops=5e5, speed=190.0, twin_of="loop", twin="equal_parameters"),
        variant("loop", "recursive", (2.20, 2.21, 2.22), speed=95.0),
        variant(
            "routed",
            "routed",
            (2.24, 2.25, 2.26),
            flops=7.5e5,
            speed=120.0,
            oracle=2.1,
            unrouted="loop",
            histogram=(0, 20, 60, 20),
        ),
        variant(
            "experts",
            "experts",
            (1.90, 1.91, 1.92),
            flops=2e6,
            speed=40.0,
            parameters=6_000_000,
            load=((0.5, 0.3, 0.2), (0.4, 0.3, 0.3)),
            text="<script>alert('$x$')</script>\nand more.",
        ),
    )


def write_corpus(path: Path) -> Path:
    """A text with some order in it, so that there is something to learn."""
    lines = [" ".join(WORDS[(7 * i + j * j) % len(WORDS)] for j in range(12)) for i in range(400)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def tiny_study(folder: Path, *variants: dict[str, Any], **changes: Any) -> StudyConfig:
    """A real study whose cells train in a second: width 16, one block or two, byte tokens."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "variants": list(variants) or [{"name": "vanilla"}, {"name": "mor-expert"}],
        "budget": {"kind": "steps", "value": 6},
        "set": {
            "model": {
                "vocab_size": 257,
                "d_model": 16,
                "attention": {"heads": 2, "kv_heads": 1},
                "mixer": {"kind": "swiglu", "d_ff": 16},
            },
            "data": {
                "corpus": str(write_corpus(folder / "corpus.txt")),
                "tokenizer": {"kind": "byte"},
                "val_fraction": 0.05,
            },
            "train": {
                "batch_size": 2,
                "seq_len": 16,
                "lr": 0.01,
                "warmup_steps": 1,
                "log_every": 1,
                "eval_every": 3,
                "checkpoint_every": 2,
                "precision": "fp32",
                "threads": 1,
            },
        },
        "sample": {"prompt": "the ", "max_new_tokens": 5},
        "report": {"decode_tokens": 4, "map_tokens": 12, "trace_windows": 4},
    }
    return StudyConfig.model_validate(tree | changes)
