"""Whether the best learning rate of a narrow model is the best of wider ones, with and without `model.width_scaling`.

    python benchmarks/width_transfer.py [benchmarks/results/NAME.json] [--optimizer muon] [--widths 64 128 256]

Preset `vanilla` with three layers, heads of 16 channels and mixers twice as wide as the model, on the characters of
tinyshakespeare: held-out loss after 80 steps of 8 x 64 tokens, for learning rates a factor of two apart. At the base
width both ways are one.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

import morex
from morex.study.bench import write_json
from morex.train.trainer import train

BASE = 32
RATES = tuple(0.001 * 2**n for n in range(6))
FIXED = (
    "model.schedule={layers: 3}",
    "model.vocab_size=65",
    "model.max_seq_len=64",
    "data.corpus=tinyshakespeare",
    "data.tokenizer={kind: char}",
    "data.val_fraction=0.02",
    "train.steps=80",
    "train.warmup_steps=10",
    "train.batch_size=8",
    "train.seq_len=64",
    "train.schedule=trapezoid",
    "train.precision=fp32",
    "train.device=cpu",
    "train.threads=1",
    "train.eval_every=0",
    "train.checkpoint_every=0",
)


def held_out_loss(width: int, rate: float, is_scaled: bool, optimizer: str, init_std: float) -> float:
    overrides = [
        *FIXED,
        f"model.d_model={width}",
        f"model.attention={{heads: {width // 16}, kv_heads: {width // 16}, head_dim: 16}}",
        f"model.mixer={{kind: swiglu, d_ff: {2 * width}}}",
        f"train.lr={rate}",
        f"train.optimizer={optimizer}",
        f"model.init_std={init_std}",
    ]
    if is_scaled:
        overrides.append(f"model.width_scaling={{base_width: {BASE}}}")
    with tempfile.TemporaryDirectory() as folder:
        summary = train(morex.load_config("vanilla", overrides), Path(folder) / "run", console=Console(quiet=True))
    return float(summary["val_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, nargs="?", default=Path("benchmarks/results/width-transfer.json"))
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help=f"beside the base, {BASE}")
    parser.add_argument("--init-std", type=float, default=0.1, help="of initial weights at the base")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for width, is_scaled in ((BASE, False), *((width, way) for width in options.widths for way in (False, True))):
        how = is_scaled, options.optimizer, options.init_std
        losses = {rate: held_out_loss(width, rate, *how) for rate in RATES}
        best = min(losses, key=losses.__getitem__)
        row = {"width": width, "width_scaling": is_scaled, "optimizer": options.optimizer, "init_std": options.init_std}
        row["best_lr"] = best
        row |= {"val_loss": losses[best], "val_loss_by_lr": {str(rate): loss for rate, loss in losses.items()}}
        row["val_loss_at_base_lr"] = losses[rows[0]["best_lr"] if rows else best]
        rows.append(row)
        print(row, flush=True)
    write_json(options.target, rows, ["python", *sys.argv])


if __name__ == "__main__":
    main()
