"""Turns the compute budget of a trained `threshold` model: moves its thresholds and measures what that costs.

    python examples/turn_the_budget.py runs/threshold --shifts -1 0 1

A higher threshold lets fewer tokens go on. Nothing is trained.
"""

import argparse
from pathlib import Path

import torch

import morex
from morex.data.prepare import prepare
from morex.depth.threshold import ThresholdRouter
from morex.eval.loss import evaluate


def main() -> None:
    """Prints held-out loss and mean depth for each shift of the thresholds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a model with the router `threshold`")
    parser.add_argument("--shifts", type=float, nargs="+", default=[-1.0, -0.5, 0.0, 0.5, 1.0])
    options = parser.parse_args()
    config = morex.load_config(options.run / "config.yaml")
    model, tokenizer = morex.load(options.run)
    routers = [module for module in model.modules() if isinstance(module, ThresholdRouter)]
    if not routers:
        raise SystemExit(f"'{options.run}' has no router of kind threshold; its router is {config.model.depth.kind}")
    learned = [router.threshold.clone() for router in routers]
    seq_len = config.train.seq_len
    data = prepare(config.data, config.model.vocab_size, seq_len, tokenizer)
    sample = torch.tensor([data.val.tokens[:seq_len].astype("int64")])
    for shift in options.shifts:
        for router, threshold in zip(routers, learned, strict=True):
            router.threshold.copy_(threshold + shift)
        loss = evaluate(model, data.val, seq_len, config.eval.batch_size).loss
        with torch.no_grad():
            depth = model(sample, return_trace=True).trace.depth.double().mean()
        print(f"shift {shift:+.2f}: loss {loss:.4f}, mean depth {depth:.2f} over the first {seq_len} tokens")


if __name__ == "__main__":
    main()
