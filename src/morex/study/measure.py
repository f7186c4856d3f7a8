"""What is measured of a trained cell: halves of the held-out set, a sample, decoding speed, where tokens went.

Everything is read from the run folder and written back to it as cell.json. Shapes: B batch, T tokens, K experts chosen.
"""

import statistics
import time
from collections.abc import Sequence

import torch

from morex.config import Config
from morex.data.prepare import PreparedData
from morex.data.source import beginning, halves, prepare_source
from morex.data.stream import TokenStream
from morex.data.tasks.prepared import HeldOut, PreparedTask
from morex.data.tokenizer import Tokenizer
from morex.depth.policy import Depth
from morex.eval.traces import own_rule, traced_batches
from morex.loading import decides_depth
from morex.model.lm import LanguageModel
from morex.sections.mixers import FeedForwardConfig
from morex.study.records import DepthMap, Measures, Routing, Sample
from morex.study.spec import ReportConfig, SampleConfig, StudyConfig
from morex.train.checkpoint import load
from morex.train.opening import evaluate_by
from morex.train.precision import resolve_device
from morex.train.runs import RunFolder
from morex.train.setup import cpu_threads

DECODE_PROMPT = 16
DECODE_RUNS = 3
TRACE_BATCH = 8


def measure(run: RunFolder, study: StudyConfig) -> Measures:
    """Measures a finished run for a study."""
    config = run.config()
    with cpu_threads(config.train.threads):
        model, tokenizer = load(run.path, device=str(resolve_device(config.train.device)))
        data = prepare_source(config, tokenizer)
        first, second = (None, None) if study.learning_rates is None else _half_losses(model, data, config)
        refusal = None
        sample = speed = None
        if _classifies(config):
            refusal = "This model is a classifier (model.head.kind), so it does not decode."
        elif own_rule(config) is None:
            sample = _sample(model, data, tokenizer, study.sample)
            speed = _decode_speed(model, data.val, study.report.decode_tokens)
        else:
            refusal = "This model has no causal rule (depth.causal is 'none'), so it cannot be decoded."
        routing = _routing(model, data, tokenizer, config, study.report)
    return Measures(
        val_loss_first_half=first,
        val_loss_second_half=second,
        decode_tokens_per_s=speed,
        sample=sample,
        routing=routing,
        refusal=refusal,
    )


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Text of each token; characters of several tokens stand at the last of them, the end of a text is `¶`."""
    texts, done = [], 0
    for end in range(1, len(ids) + 1):
        if ids[end - 1] == tokenizer.eos_id:
            texts.append("¶")
            done = len(tokenizer.decode(ids[:end]))
            continue
        text = tokenizer.decode(ids[:end])
        if text.endswith("\ufffd"):
            texts.append("")
            continue
        texts.append(text[done:])
        done = len(text)
    return texts


def _half_losses(model: LanguageModel, data: PreparedData | PreparedTask, config: Config) -> tuple[float, float]:
    first, second = (evaluate_by(config, model, half).loss for half in halves(data.val, config.train.seq_len))
    return first, second


def _classifies(config: Config) -> bool:
    return config.model.head.kind == "classifier"


def _sample(
    model: LanguageModel, data: PreparedData | PreparedTask, tokenizer: Tokenizer, sample: SampleConfig
) -> Sample:
    """What the model makes of the study's prompt, or of a task's first held-out question."""
    if isinstance(data, PreparedTask):
        prompt = list(map(int, data.val.examples[0].prompt))
        shown = tokenizer.decode(prompt)
    else:
        prompt, shown = list(tokenizer.encode(sample.prompt)), sample.prompt
    [ids] = model.generate(
        [prompt],
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        top_k=sample.top_k if sample.temperature else None,
        eos_id=tokenizer.eos_id,
        seed=sample.seed,
    )
    new = [i for i in ids[len(prompt) :] if i != tokenizer.eos_id]
    return Sample(prompt=shown, text=tokenizer.decode(new))


def _decode_speed(model: LanguageModel, held_out: TokenStream | HeldOut, new_tokens: int) -> float:
    """Tokens per second of greedy decoding of one sequence, the median of three."""
    device = model.embedding.weight.device
    prompt = torch.tensor([beginning(held_out, DECODE_PROMPT)], device=device)
    model.generate(prompt, max_new_tokens=4)
    speeds = []
    for _ in range(DECODE_RUNS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=new_tokens)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        speeds.append(new_tokens / (time.perf_counter() - start))
    return statistics.median(speeds)


@torch.no_grad()
def _routing(
    model: LanguageModel, data: PreparedData | PreparedTask, tokenizer: Tokenizer, config: Config, report: ReportConfig
) -> Routing | None:
    routed, mixer = decides_depth(config.model), config.model.mixer
    experts = 0 if isinstance(mixer, FeedForwardConfig) else mixer.router.experts
    if not routed and not experts:
        return None
    depth = own_rule(config)
    schedule = config.model.schedule.resolved
    deepest = schedule.recursions * schedule.num_groups if routed else 0
    histogram = torch.zeros(deepest + 1, dtype=torch.long)
    loads: dict[str, torch.Tensor] = {}
    tokens = windows = 0
    for batch in traced_batches(model, data.val, config.train.seq_len, TRACE_BATCH, (depth,)):
        (trace,), real = batch.traces, batch.real
        if routed:
            histogram += torch.bincount(trace.depth.cpu()[real], minlength=deepest + 1)
        for layer, calls in trace.experts.items():
            for chosen in calls:
                ids = chosen.cpu()[real]
                counts = torch.bincount(ids[ids >= 0], minlength=experts).double()
                loads[layer] = loads.get(layer, torch.zeros(experts, dtype=torch.double)) + counts
        tokens += int(real.sum())
        windows += len(batch.tokens)
        if windows >= report.trace_windows:
            break
    return Routing(
        tokens=tokens,
        deepest=deepest,
        histogram=tuple(histogram.tolist()) if routed else None,
        depth_map=_depth_map(model, data, tokenizer, config, report, depth) if routed else None,
        expert_load={name: tuple((load / load.sum().clamp(min=1)).tolist()) for name, load in loads.items()},
    )


def _depth_map(
    model: LanguageModel,
    data: PreparedData | PreparedTask,
    tokenizer: Tokenizer,
    config: Config,
    report: ReportConfig,
    depth: Depth,
) -> DepthMap:
    limit = min(report.map_tokens, config.train.seq_len)
    if report.map_text is None or isinstance(data, PreparedTask):
        text = beginning(data.val, limit)
    else:
        text = list(tokenizer.encode(report.map_text))
    ids = text[:limit]
    device = model.embedding.weight.device
    out = model(torch.tensor([ids], device=device), depth=depth, return_trace=True)
    return DepthMap(tokens=tuple(token_texts(tokenizer, ids)), depths=tuple(out.trace.depth[0].tolist()))
