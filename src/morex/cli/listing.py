"""`presets` and `data`: what there is to train, and on what."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from morex.cli.app import AsJson, ConfigSource, Overrides, app, examples
from morex.cli.terminal import number, print_json, print_table
from morex.loading import ConfigError, load_config
from morex.loading import presets as preset_names

if TYPE_CHECKING:
    from morex.sections.train import TrainConfig

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
SHOWN_CHARACTERS = 90
"""Of a task's question; longer ones lose their middle."""
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


@app.command(
    epilog=examples(
        "morex data vanilla",
        "morex data vanilla --set data.corpus=book.txt --set data.tokenizer.kind=byte",
        "morex data more --set data.val_fraction=0.05 --json",
        "morex data vanilla --set data.task.kind=addition",
    )
)
def data(config: ConfigSource, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Prepare the corpus or the task of a config and describe it.

    Documents, bytes and tokens on both sides of the split, and how often training sees the text; of a task examples,
    difficulties and lengths. Prepared tokens are kept in the cache folder ($MOREX_CACHE, default ~/.cache/morex), where
    training finds them.
    """
    settings = load_config(config, overrides or [])
    from morex.data.inspect import describe, describe_task

    if settings.data.task is not None:
        task = describe_task(settings)
        print_json(task) if as_json else _print_task(task, settings.train)
        return

    description = describe(settings.data, settings.model.vocab_size, settings.train.seq_len)
    description["epochs"] = _tokens_seen(settings.train) / description["train"]["tokens"]
    if as_json:
        print_json(description)
        return
    _print_description(description, settings.train)


def _tokens_seen(train: "TrainConfig") -> int:
    return train.steps * train.batch_size * train.seq_len


def _print_task(task: Mapping[str, Any], train: "TrainConfig") -> None:
    for example in task["examples"]:
        question = " ".join(example["question"].split())
        if len(question) > SHOWN_CHARACTERS:
            question = f"{question[: SHOWN_CHARACTERS // 2]} … {question[-SHOWN_CHARACTERS // 2 :]}"
        print(f"difficulty {example['difficulty']:>2}: {question} {' '.join(example['answer'].split())}")
    tokenizer, sides = task["tokenizer"], {"training": task["train"], "held-out": task["val"]}
    print(f"Task: {task['task']}. Tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} ids.")
    for name, side in sides.items():
        number = "no end" if side["examples"] is None else f"{side['examples']:,}"
        print(
            f"{name.capitalize()} examples: {number}, difficulty {side['easiest']} to {side['hardest']}, "
            f"{side['mean_tokens']:.1f} tokens on average, {side['most_tokens']} at most."
        )
    if task["answers"]:
        shares = ", ".join(f"{answer} {share:.1%}" for answer, share in task["answers"].items())
        print(f"Answers: {shares}.")
    if task["shortened"]:
        print(f"Examples shortened at the beginning to fit {train.seq_len} tokens: {task['shortened']:,}.")


def _print_description(description: Mapping[str, Any], train: "TrainConfig") -> None:
    sides = {"training": description["train"], "held out": description["val"], "all": description}
    columns = {
        "documents": "documents",
        "bytes": "bytes",
        "tokens": "tokens",
        "bytes_per_token": "bytes/token",
        "windows": f"windows of {train.seq_len}",
    }
    rows = [[name, *(number(side[key]) if key in side else "" for key in columns)] for name, side in sides.items()]
    print_table([str(description["corpus"]), *columns.values()], rows)
    tokenizer = description["tokenizer"]
    print(f"Tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} ids.")
    print(f"Split: by {description['split']}.")
    if description["left_out"]:
        print(f"Left out of training: {description['left_out']:,} documents that are held out.")
    print(
        f"Training: {train.steps:,} steps of {train.batch_size} x {train.seq_len} tokens see the training text "
        f"{description['epochs']:.2f} times."
    )
    print(f"Token files: {description['folder']}")
    print(f"The text begins: {' '.join(description['sample'].split())}")
