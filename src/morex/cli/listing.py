"""`presets`: what there is to train."""

from dataclasses import asdict
from typing import Annotated

import typer

from morex.cli.app import AsJson, app, examples
from morex.cli.terminal import number, print_json, print_table
from morex.loading import ConfigError, load_config
from morex.loading import presets as preset_names

PRESET_COLUMNS = {
    "preset": "preset",
    "parameters": "parameters",
    "unique_non_embedding": "unique\nnon-embedding",
    "unrolled_depth": "unrolled\ndepth",
    "seq_len": "sequence",
    "train_flops_per_token": "training\nFLOPs/token",
    "decode_flops_per_token": "decoding\nFLOPs/token",
    "kv_bytes_per_token": "KV bytes\n/token",
}
SHORTENED = {"train_flops_per_token", "decode_flops_per_token"}


@app.command(
    epilog=examples("morex presets", "morex presets more more-baseline", "morex presets --seq-len 2048 --json")
)
def presets(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Presets to show; default: all.")
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence, and of the cache when decoding; default: the preset's."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the presets with parameters, depth, FLOPs and cache.

    All numbers are closed forms of the config; no model is built.
    """
    if seq_len is not None and seq_len < 1:
        raise ConfigError(f"--seq-len {seq_len} must be 1 or more")
    from morex.model.count import count

    rows = []
    for name in names or preset_names():
        config = load_config(name)
        length = seq_len or config.train.seq_len
        rows.append({"preset": name, "seq_len": length} | asdict(count(config.model, seq_len=length)))
    if as_json:
        print_json(rows)
        return
    print_table(
        list(PRESET_COLUMNS.values()), [[number(row[key], key in SHORTENED) for key in PRESET_COLUMNS] for row in rows]
    )
