"""`morex generate` at tiny sizes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import morex
from cli.shell import Shell, Stdin
from morex.cli.generation import parse_size
from morex.cli.prompts import Prompt
from morex.cli.results import Ask, Meter, Result
from morex.infer import Completion, Engine, Event, LogProbs, Params
from morex.infer import room as room_module
from morex.infer.demand import Demand
from morex.infer.passes import Passes
from morex.infer.room import default_cache_bytes
from morex.loading import ConfigError

DRAWS = ["--temperature", "1.5", "--seed", "3", "--max-new-tokens", "6"]


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_lines(*lines: Any) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    Path("prompts.jsonl").write_text(text + "\n", encoding="utf-8")


def test_prompts_draw_as_the_rows_of_a_batch(trained: Path, shell: Shell) -> None:
    model, tokenizer = morex.load(trained)
    texts = ["the river", "the people of the town", "peace"]
    ids = [tokenizer.encode(text) for text in texts]
    rows = model.generate(ids, max_new_tokens=6, temperature=1.5, seed=3, eos_id=tokenizer.eos_id)
    words = [word for text in texts for word in ("--prompt", text)]
    found = shell.succeeds("generate", trained, *words, *DRAWS, "--json").json
    assert [one["text"] for one in found] == [tokenizer.decode(row) for row in rows]
    assert [one["new_tokens"] for one in found] == [len(row) - len(own) for row, own in zip(rows, ids, strict=True)]
    assert all(one["text"] == one["prompt"] + one["new_text"] for one in found)


def test_lines_have_options_of_their_own(trained: Path, shell: Shell) -> None:
    own = {"max_new_tokens": 4, "temperature": 1.2, "top_k": 9, "seed": 7, "depth": 2, "logprobs": 2}
    write_lines({"prompt": "the river", **own}, "", {"prompt": "peace"}, {"prompt": [5, 6, 7], "stop_ids": [9]})
    found = shell.succeeds("generate", trained, "--prompts", "prompts.jsonl", *DRAWS, "--json").json
    model, tokenizer = morex.load(trained)
    engine = Engine(model, tokenizer, cache_bytes=2**22)
    drawn = {"max_new_tokens": 6, "temperature": 1.5, "seed": 3, "eos_id": tokenizer.eos_id}
    params = [Params(**{**drawn, **own}), Params(**drawn, row=1), Params(**drawn, row=2, stop_ids=[9])]
    expected = engine.generate(["the river", "peace", [5, 6, 7]], params)
    assert [one["new_text"] for one in found] == [one.text for one in expected]
    assert [one["reason"] for one in found] == [one.reason for one in expected]
    tokens = found[0]["tokens"]
    assert [token["id"] for token in tokens] == expected[0].new and "tokens" not in found[1]
    assert expected[0].logprobs is not None
    for token, logprobs in zip(tokens, expected[0].logprobs, strict=True):
        assert token["logprob"] == pytest.approx(logprobs.token, abs=1e-5)
        assert [one["id"] for one in token["likeliest"]] == [index for index, _ in logprobs.likeliest]


def test_what_is_wrong_with_a_line_concerns_no_other(trained: Path, shell: Shell) -> None:
    bad = {
        "{not json": "line 2 is not valid JSON",
        '"text"': "line 3 must be an object with a prompt",
        '{"prompt": "the", "top_q": 5}': "line 4 has the unknown option 'top_q'; did you mean 'top_k' or|line 4 .*top_",
        '{"prompt": ""}': "at least one token",
        '{"prompt": "the", "depth": 9}': "asks for 9 recursions; this model takes 1 to 3",
        '{"prompt": "the", "depth": [1]}': "line 7: depth .* must be text or a number",
        '{"prompt": "the", "temperature": 0, "top_k": 4}': "top_k 4 has no effect at temperature 0",
        '{"prompt": "the", "top_p": 1.5}': "top_p 1.5 must be above 0",
        r'{"prompt": "the", "stop": ["\ud800"]}': "stop string .* is not valid UTF-8",
        r'{"prompt": "the \udcff"}': "prompt .* is not valid UTF-8",
        '{"prompt": "the", "max_new_tokens": 1000000000}': "needs .* pages",
        '{"prompt": "the", "max_new_tokens": ' + "9" * 400 + "}": "more than 18 digits",
        '{"prompt": 5}': "a prompt is text, or a list",
        '{"prompt": [1, 100000]}': "token id 100000 is outside the vocabulary",
    }
    write_lines({"prompt": "the river"}, *bad, {"prompt": "peace"})
    result = shell("generate", trained, "--prompts", "prompts.jsonl", *DRAWS, "--out", "texts.jsonl")
    assert result.code == 1 and result.out == "" and f"{len(bad)} failed" in result.err
    found = {line.pop("index"): line for line in lines_of("texts.jsonl")}
    for index, sentence in enumerate(bad.values(), 1):
        assert re.search(sentence, found[index]["error"]), found[index]
        assert "text" not in found[index]
    last = len(bad) + 1
    assert "error" not in found[0] and "error" not in found[last]
    write_lines(*[{"prompt": "the river"}] * last, {"prompt": "peace"})
    alone = shell.succeeds("generate", trained, "--prompts", "prompts.jsonl", *DRAWS, "--json").json
    assert [found[0], found[last]] == [alone[0], alone[last]]


def test_lines_come_out_as_prompts_are_done(trained: Path, shell: Shell) -> None:
    write_lines({"prompt": "the river", "max_new_tokens": 9}, {"prompt": "peace", "max_new_tokens": 2})
    words = ["generate", trained, "--prompts", "prompts.jsonl", "--out", "texts.jsonl"]
    result = shell.succeeds(*words)
    assert result.out == "" and "2 prompts, 11 new tokens, " in result.err and "in texts.jsonl" in result.err
    assert [line["index"] for line in lines_of("texts.jsonl")] == [1, 0]
    before = sorted(lines_of("texts.jsonl"), key=lambda line: int(line["index"]))
    shell.succeeds(*words, "--concurrency", "1")
    assert lines_of("texts.jsonl") == before


def test_ctrl_c_keeps_what_is_done(trained: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def interrupting(engine: Engine) -> list[Event]:
        if Path("texts.jsonl").read_text():
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupting)
    write_lines({"prompt": "the river", "max_new_tokens": 9}, {"prompt": "peace", "max_new_tokens": 2})
    result = shell("generate", trained, "--prompts", "prompts.jsonl", "--out", "texts.jsonl")
    assert result.code == 130 and "Traceback" not in result.err
    assert "interrupted: 1 of 2 prompts are done, in texts.jsonl" in result.err
    assert [line["index"] for line in lines_of("texts.jsonl")] == [1]


def test_a_prompt_that_is_refused_beside_others(trained: Path, shell: Shell) -> None:
    words = ["--prompt", "", "--max-new-tokens", "3"]
    assert "at least one token" in shell.refuses("generate", trained, *words)
    result = shell("generate", trained, "--prompt", "the", *words)
    assert result.code == 1 and result.out == shell.succeeds("generate", trained, "--prompt", "the", *words[2:]).out
    assert re.search(r"^error: prompt 1: .*at least one token", result.err, re.M) and "1 failed" in result.err


def test_a_model_that_goes_wrong_is_said_once(trained: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Passes, "enter", broken)
    assert "RuntimeError: no such kernel" in shell.refuses("generate", trained, "--prompt", "the")
    result = shell("generate", trained, "--prompt", "the", "--prompt", "a", "--json")
    assert result.code == 1 and all("no such kernel" in one["error"] for one in result.json)


def test_stdin(trained: Path, shell: Shell, stdin: Stdin) -> None:
    words = ["generate", trained, "--prompts", "-", "--max-new-tokens", "3", "--json"]
    stdin("\ufeffthe river\r\n\r\npeace".encode())
    assert [one["prompt"] for one in shell.succeeds(*words).json] == ["the river", "peace"]
    stdin(b'{"prompt": "the river", "max_new_tokens": 1}\n{"prompt": "peace"}\n')
    assert [one["new_tokens"] for one in shell.succeeds(*words).json] == [1, 3]
    stdin(b"\n")
    assert "nothing to continue" in shell.refuses(*words)


def test_stop_and_penalty_reach_the_engine(trained: Path, shell: Shell) -> None:
    words = ["generate", trained, "--prompt", "the river", "--max-new-tokens", "12", "--json"]
    free = shell.succeeds(*words, "--logprobs", "0").json[0]
    stop = free["new_text"][3:5]
    stopped = shell.succeeds(*words, "--stop", "\0", "--stop", stop).json[0]
    assert stopped["new_text"] == free["new_text"].partition(stop)[0] and stopped["reason"] == "stop"
    by_id = shell.succeeds(*words, "--stop-id", str(free["tokens"][0]["id"])).json[0]
    assert (by_id["new_text"], by_id["new_tokens"]) == ("", 1)
    assert shell.succeeds(*words, "--repetition-penalty", "1e6").json[0]["new_text"] != free["new_text"]
    assert len(shell.succeeds(*words, "--trace").json[0]["tokens"]) == free["new_tokens"]


def test_precision_threads_and_cache(trained: Path, shell: Shell) -> None:
    words = ["generate", trained, "--prompt", "the river", "--max-new-tokens", "3"]
    before = torch.get_num_threads()
    assert shell.succeeds(*words, "--precision", "fp32", "--threads", "1", "--cache-bytes", "1MiB").out
    assert shell.succeeds(*words, "--precision", "bf16").out.startswith("the river")
    assert torch.get_num_threads() == before
    assert "larger cache_bytes" in shell.refuses(*words, "--cache-bytes", "4kB")


def test_drafts_change_no_text_and_are_counted(trained: Path, shell: Shell) -> None:
    write_lines({"prompt": "the river", "draft": 3}, {"prompt": "the river"}, {"prompt": "the river", "draft": 20})
    words = ["generate", trained, "--prompts", "prompts.jsonl", "--max-new-tokens", "9", "--json"]
    drafted, plain, refused = json.loads(shell(*words).out)
    assert drafted.pop("drafted") >= 6 and drafted.pop("accepted") >= 0
    assert drafted == plain
    assert "draft 20 must be an integer" in refused["error"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--concurrency", "0"], "--concurrency 0 must be 1 or more"),
        (["--threads", "0"], "--threads 0 must be 1 or more"),
        (["--precision", "fp8"], "--precision 'fp8' is unknown; use fp32 or bf16"),
        (["--cache-bytes", "many"], "--cache-bytes 'many' must be a size above 0, such as 512MB"),
        (["--out", "nowhere/texts.jsonl"], "there is no folder 'nowhere'"),
        (["--top-k", "5"], "top_k 5 has no effect at temperature 0"),
        (["--min-p", "2", "--temperature", "1"], "min_p 2.0 must lie between 0 and 1"),
        (["--repetition-penalty", "0"], "repetition_penalty 0.0 must be above 0"),
        (["--logprobs", "-1"], "logprobs -1"),
        (["--stop", ""], "stop string '' must be text"),
        (["--stop", "\udcff"], "stop string .* is not valid UTF-8"),
        (["--stop-id", "100000"], "stop id 100000 is outside the vocabulary"),
        (["--depth", "9"], "depth '9' asks for 9 recursions"),
        (["--draft", "99"], "draft 99 must be an integer from 1 to 16"),
        (["--draft", "2", "--draft-depth", "3"], "draft_depth 3 must be an integer from 1 to 2"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_refused_whole(words: list[str], sentence: str, trained: Path, shell: Shell) -> None:
    prompts = ["--prompt", "the", "--prompt", "peace"]
    assert re.search(sentence, shell.refuses("generate", trained, *prompts, *words))
    assert not Path("texts.jsonl").exists()


def test_sizes() -> None:
    sizes = {"1000": 1000, "512MB": 512 * 10**6, "2GiB": 2 * 2**30, "1.5 kib": 1536, "3TB": 3 * 10**12, "8b": 8}
    assert {text: parse_size("--cache-bytes", text) for text in sizes} == sizes
    for text in ("", "0", "-1", "MB", "5XB", "1e3", "0.1"):
        with pytest.raises(ConfigError, match="--cache-bytes"):
            parse_size("--cache-bytes", text)


def test_the_default_cache_holds_the_texts_within_a_quarter_of_the_memory(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = morex.load(trained)
    entry = model.new_store(2**20).entry_bytes
    needed = sum(Demand(model.config, 16).pages(tokens, 3) for tokens in (100, 30)) * 16 * entry
    assert needed < default_cache_bytes(model, [(100, 3), (30, 3)]) <= 2 * needed
    monkeypatch.setattr(room_module, "_memory", lambda device: 4 * needed)
    assert default_cache_bytes(model, [(100, 3)] * 9) == needed
    assert default_cache_bytes(model, [(10**9, 3)]) == default_cache_bytes(model, []) == 16 * entry


def test_a_record_has_depths_and_plain_numbers() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(chr(97 + index) for index in ids)

    params = Params(logprobs=1, trace=True)
    ask = Ask(0, Prompt("a"), params, [0])
    logprobs = [LogProbs(-0.5, [(1, -0.5)]), LogProbs(-torch.inf, [(0, -0.1)])]
    trace = {"scores": {"router": [torch.tensor([0.5, float("nan")])]}}
    done = Completion(0, [0], [1, 2], "bc", "length", logprobs=logprobs, trace=trace)
    record = Result(ask, None, done, [2.0, None]).record(Letters())  # type: ignore[arg-type]
    assert record["text"] == "abc"
    assert record["tokens"] == [
        {"id": 1, "text": "b", "logprob": -0.5, "likeliest": [{"id": 1, "text": "b", "logprob": -0.5}], "depth": 2.0},
        {"id": 2, "text": "c", "logprob": None, "likeliest": [{"id": 0, "text": "a", "logprob": -0.1}]},
    ]
    assert record["trace"] == {"scores": {"router": [[0.5, None]]}}
    assert "NaN" not in json.dumps(record) and "Infinity" not in json.dumps(record)


def test_a_meter_without_depths_has_no_mean() -> None:
    meter = Meter()
    meter.note(Event(0, None, "rest", reason="length"))
    meter.note(Event(0, 5))
    assert meter.tokens == 1 and meter.mean_depth is None and re.fullmatch(r"[\d,]+ tokens/s", str(meter))
    meter.note(Event(0, 5, depth=2))
    meter.note(Event(0, 5, depth=1))
    assert meter.mean_depth == 1.5 and str(meter).endswith(" tokens/s, mean depth 1.50")
