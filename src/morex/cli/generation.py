"""`generate` and `chat`: text from a trained model."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from heapq import nlargest
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from morex.cli.app import AsJson, Depth, Device, RunFolder, app, examples
from morex.cli.prompts import Prompt, all_prompts
from morex.cli.terminal import check_counts, check_target, console
from morex.loading import ConfigError

if TYPE_CHECKING:
    from morex.cli.results import Ask
    from morex.data.encoding import Tokenizer
    from morex.infer import Params
    from morex.model.lm import LanguageModel

PRECISIONS = ("fp32", "bf16")
UNITS = {"": 1, "B": 1} | {
    f"{letter}{unit}": base**power
    for power, letter in enumerate("kMGT", 1)
    for unit, base in (("B", 1000), ("iB", 1024))
}
CHAT_TOKENS = 4096
"""That fit at least into the default cache of a conversation."""

MaxNewTokens = Annotated[int, typer.Option(help="Tokens to add at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the fewest tokens whose probability reaches p.")]
MinP = Annotated[float | None, typer.Option(help="Draw from tokens at least p times as likely as the likeliest.")]
Penalty = Annotated[float, typer.Option(help="Above 1: tokens that the text already has become less likely.")]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.", show_default=False)
]
StopId = Annotated[
    list[int] | None, typer.Option(metavar="ID", help="End at this token; may be repeated.", show_default=False)
]
Precision = Annotated[
    str | None, typer.Option(metavar="NAME", help="fp32 or bf16; default: the format of the run's weights.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's.")]


@app.command(
    epilog=examples(
        "morex generate runs/first --prompt 'Fellow citizens, '",
        "morex generate runs/first --prompt A --prompt B --temperature 0.8 --top-k 40 --seed 1",
        "morex generate runs/first --prompts prompts.txt --depth adaptive:64 --json",
        "morex generate runs/first --prompts prompts.jsonl --out texts.jsonl --max-new-tokens 200",
        'echo \'{"prompt": "The ", "temperature": 0.8, "seed": 1}\' | morex generate runs/first --prompts -',
    )
)
def generate(
    run: RunFolder,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text to continue; may be repeated.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text with one prompt a line, or a .jsonl file of objects with a prompt and options of its own; - is "
            "stdin, JSONL where its first line is such an object.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write one JSON object a line, as soon as each prompt is done: in that order, with the prompt's index "
            "from 0.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws; each prompt has draws of its own.")] = None,
    stop: Stop = None,
    stop_id: StopId = None,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="In JSON: log probabilities of each new token and of the N likeliest."),
    ] = None,
    depth: Depth = None,
    draft: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Draft so many tokens at a time with the first recursions, and verify them together: the same texts, "
            "sooner where many are accepted.",
        ),
    ] = None,
    draft_depth: Annotated[int, typer.Option(metavar="R", help="Recursions of a draft.")] = 1,
    trace: Annotated[
        bool, typer.Option("--trace", help="In JSON: depth, router scores and experts of each token.")
    ] = False,
    concurrency: Annotated[int, typer.Option(help="Prompts that are decoded at a time.")] = 64,
    cache_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Keys and values, such as 512MB or 2GiB; default: what the prompts need, at most a quarter of the "
            "memory.",
        ),
    ] = None,
    precision: Precision = None,
    threads: Threads = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue prompts with a trained model.

    Prompts of any lengths are decoded side by side, each token as deep as its router sends it; what one becomes does
    not depend on the others. A line of a .jsonl file may set max_new_tokens, temperature, top_k, top_p, min_p,
    repetition_penalty, seed, stop, stop_ids, logprobs, depth, draft and draft_depth for its prompt. A prompt that is
    refused has an error in place of a text, the others go on, and the exit code is 1. Ctrl-C keeps what --out has.
    """
    found = all_prompts(prompt or [], prompts)
    check_counts(("--concurrency", concurrency), ("--threads", threads))
    size = None if cache_bytes is None else parse_size("--cache-bytes", cache_bytes)
    if out is not None:
        check_target("--out", out)
    with _opened(run, device, precision, threads) as (model, tokenizer):
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": stop or (),
            "stop_ids": stop_id or (),
            "logprobs": logprobs,
            "depth": depth,
            "draft": draft,
            "draft_depth": draft_depth,
            "trace": trace,
        }
        _params(model, tokenizer, options)
        asks = [_ask(model, tokenizer, index, own, options) for index, own in enumerate(found)]
        failed = _run(model, tokenizer, asks, concurrency, size, out, as_json, is_alone=prompts is None)
    if failed:
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "morex chat runs/first",
        "morex chat runs/first --show-depth --temperature 0.7 --top-p 0.9",
        "morex chat runs/first --depth uniform:2 --stop '.' --seed 1",
        "echo 'Fellow citizens, ' | morex chat runs/first",
    )
)
def chat(
    run: RunFolder,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws; each turn has draws of its own.")] = None,
    stop: Stop = None,
    stop_id: StopId = None,
    depth: Depth = None,
    show_depth: Annotated[
        bool,
        typer.Option(
            "--show-depth",
            help="Colour each token by the recursions that it took to find it, or write their number behind it where "
            "there are no colours; after each turn the mean depth and tokens/s.",
        ),
    ] = False,
    cache_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Keys and values, such as 512MB or 2GiB; default: what a text of 4096 tokens needs, or one of "
            "model.max_seq_len where that is more, at most a quarter of the memory.",
        ),
    ] = None,
    precision: Precision = None,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Talk with a trained model: what you type is appended to the text so far, and the model goes on from there.

    These models continue text; there is no template of questions and answers. /help lists the commands. Ctrl-C stops
    an answer, Ctrl-D leaves. Where stdin is no terminal each line is a turn, and stdout gets the answers alone.
    """
    check_counts(("--threads", threads))
    size = None if cache_bytes is None else parse_size("--cache-bytes", cache_bytes)
    with _opened(run, device, precision, threads) as (model, tokenizer):
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        options: dict[str, Any] = {
            **filters,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": stop or (),
            "stop_ids": stop_id or (),
            "depth": depth,
            "trace": show_depth,
        }
        params = _params(model, tokenizer, options)
        from morex.cli.conversation import Chat, Conversation, Display, is_interactive
        from morex.infer import Engine
        from morex.infer.room import default_cache_bytes

        longest = max(CHAT_TOKENS, model.config.max_seq_len), model.policy(depth, None).recursions
        engine = Engine(model, tokenizer, cache_bytes=size or default_cache_bytes(model, [longest]), most_requests=1)
        talk = Chat(Conversation(engine, params), Display(show_depth), is_interactive())
        talk.run()
    if talk.failed and not talk.is_interactive:
        raise typer.Exit(1)


@contextmanager
def _opened(
    run: Path, device: str, precision: str | None, threads: int | None
) -> "Iterator[tuple[LanguageModel, Tokenizer]]":
    """A model that decodes and its tokenizer."""
    if precision not in (None, *PRECISIONS):
        raise ConfigError(f"--precision '{precision}' is unknown; use {' or '.join(PRECISIONS)}")
    import torch

    from morex.model.checks import refuse_decoding
    from morex.train.checkpoint import load
    from morex.train.setup import cpu_threads

    with cpu_threads(threads):
        model, tokenizer = load(run, device)
        refuse_decoding(model.config, "generate")
        if precision is not None:
            model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        yield model, tokenizer


def _params(model: "LanguageModel", tokenizer: "Tokenizer", options: dict[str, Any]) -> "Params":
    """The options of a request. Raises ValueError for those that the model or the tokenizer cannot take."""
    from morex.infer.request import Params, check_params
    from morex.infer.speculation import check_draft
    from morex.model.checks import check_decodes

    params = Params(eos_id=tokenizer.eos_id, **options)
    check_params(params, model.config.vocab_size, tokenizer)
    check_decodes(model.config, params.depth)
    check_draft(model, params)
    model.policy(params.depth, None)
    return params


def _ask(model: "LanguageModel", tokenizer: "Tokenizer", index: int, prompt: Prompt, options: dict[str, Any]) -> "Ask":
    """A prompt made ready, or refused."""
    from morex.cli.results import Ask
    from morex.infer.request import as_ids

    if prompt.error is not None:
        return Ask(index, prompt, error=prompt.error)
    # Prompts draw from one seed as the rows of a batch do; a prompt with a seed of its own draws as if it were alone.
    row = 0 if "seed" in prompt.options else index
    try:
        params = _params(model, tokenizer, {**options, "row": row, **prompt.options})
        tokens = as_ids(prompt.text, model.config.vocab_size, tokenizer)
        return Ask(index, prompt, params, tokens, model.policy(params.depth, None).recursions)
    except ValueError as error:
        return Ask(index, prompt, error=str(error))


def _run(
    model: "LanguageModel",
    tokenizer: "Tokenizer",
    asks: "Sequence[Ask]",
    concurrency: int,
    cache_bytes: int | None,
    out: Path | None,
    as_json: bool,
    is_alone: bool,
) -> bool:
    """Continues prompts and hands out the results; whether one of them failed.

    Args:
        is_alone: a single prompt is the command line's own, so that what is wrong with it is wrong with the command.

    Raises:
        ConfigError: the single prompt failed.
        Interrupted: by Ctrl-C; what was done is there.
    """
    import signal

    from morex.cli.results import Batch, BatchProgress, Sinks
    from morex.infer import Engine
    from morex.infer.room import default_cache_bytes
    from morex.train.errors import Interrupted

    is_alone = is_alone and len(asks) == 1
    if is_alone and asks[0].error is not None:
        raise ConfigError(asks[0].error)
    if cache_bytes is None:
        largest = nlargest(concurrency, (ask.texts for ask in asks if ask.error is None))
        cache_bytes = default_cache_bytes(model, chain.from_iterable(largest))
    engine = Engine(model, tokenizer, cache_bytes=cache_bytes, most_requests=concurrency)
    batch, screen = Batch(engine, asks, 2 * concurrency), console(stderr=True)
    shows_texts = out is None and not as_json
    with Sinks(tokenizer, out, as_json) as sinks:
        bar = BatchProgress(batch, len(asks) > 1 and not (shows_texts and console().is_terminal))
        where = "" if out is None else f", in {out}"
        try:
            with bar:
                for result in batch.results(bar.tick):
                    if is_alone and result.error is not None:
                        raise ConfigError(result.error)
                    sinks.take(result)
        except KeyboardInterrupt:
            done = f"{batch.done} of {len(asks)} prompts are done{where}"
            raise Interrupted(f"interrupted: {done}", signal.SIGINT) from None
        sinks.finish()
    if len(asks) > 1:
        told = f"{len(asks)} prompts, {batch.meter.tokens:,} new tokens, {batch.meter}{where}"
        failed = f"; {batch.failed} failed" if batch.failed else ""
        screen.print(told + failed, style="dim", markup=False, soft_wrap=True)
    return batch.failed > 0


def parse_size(option: str, text: str) -> int:
    """Bytes of a size such as `512MB`, `2GiB` or a plain number. Raises ConfigError where it is none."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if found is None or found[2].lower() not in units or not (size := int(float(found[1]) * units[found[2].lower()])):
        raise ConfigError(f"{option} '{text}' must be a size above 0, such as 512MB, 2GiB or a number of bytes")
    return size
