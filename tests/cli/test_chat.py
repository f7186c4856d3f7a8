"""`morex chat` at tiny sizes."""

import builtins
import io
import re
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import morex
from cli.shell import Shell, Stdin
from morex.cli.conversation import COMMANDS, PALETTE, Chat, Conversation, Display, colour, typed
from morex.infer import Engine, Event, Params
from morex.infer.passes import Passes

DRAWS = ["--temperature", "1.5", "--seed", "3", "--max-new-tokens", "6"]


def test_turns_continue_the_text_so_far(trained: Path, shell: Shell, stdin: Stdin) -> None:
    stdin(b"the river\n and the people\n\n/reset\nthe river\n")
    result = shell.succeeds("chat", trained, *DRAWS)
    model, tokenizer = morex.load(trained)
    engine = Engine(model, tokenizer, cache_bytes=2**22)
    tokens, answers = list[int](), list[str]()
    for row, text in enumerate(["the river", " and the people", ""]):
        params = Params(max_new_tokens=6, temperature=1.5, seed=3, row=row, eos_id=tokenizer.eos_id)
        (done,) = engine.generate([[*tokens, *tokenizer.encode(text)]], params)
        tokens = done.tokens
        answers.append(done.text)
    assert tokenizer.eos_id not in tokens
    assert result.out == "".join(f"{answer}\n" for answer in [*answers, answers[0]])
    assert result.err == ""


def test_a_turn_computes_what_is_new(
    trained: Path, shell: Shell, stdin: Stdin, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, enter = [], Passes.enter

    def counting(passes: Passes, segments: Any) -> Any:
        entered.append(sum(len(segment.tokens) for segment in segments))
        return enter(passes, segments)

    monkeypatch.setattr(Passes, "enter", counting)
    stdin(b"the people of the town met in congress\n to speak\n")
    shell.succeeds("chat", trained, "--temperature", "0", "--max-new-tokens", "4")
    tokenizer = morex.load(trained)[1]
    first, second = (len(tokenizer.encode(text)) for text in ("the people of the town met in congress", " to speak"))
    # The last new token of a turn is drawn and not read, so the next turn reads it.
    assert entered == [first, 1, 1, 1, 1 + second, 1, 1, 1]


def test_commands_of_a_chat(trained: Path, shell: Shell, stdin: Stdin, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Params] = []
    add = Engine.add

    def noting(engine: Engine, prompt: Any, params: Params) -> int:
        asked.append(params)
        return add(engine, prompt, params)

    monkeypatch.setattr(Engine, "add", noting)
    turns = [
        "/depth 1",
        "a",
        "/depth",
        "a",
        "/temperature 0",
        "a",
        "/temperature 0.5",
        "a",
        "/reset",
        "a",
        "//a",
        "/quit",
    ]
    stdin("\n".join([*turns, "never"]).encode())
    shell.succeeds("chat", trained, "--seed", "1", "--max-new-tokens", "2", "--top-k", "9", "--depth", "2")
    assert [params.depth for params in asked] == ["1", *[None] * 5]
    assert [params.temperature for params in asked] == [0.8, 0.8, 0, 0.5, 0.5, 0.5]
    assert [params.top_k for params in asked] == [9, 9, None, 9, 9, 9]
    assert [params.row for params in asked] == [0, 1, 2, 3, 0, 1]
    stdin(b"/help\n")
    result = shell.succeeds("chat", trained)
    assert result.out == "" and all(re.search(f"^  {command} ", result.err, re.M) for command in COMMANDS)


def test_what_is_refused_in_a_chat_changes_nothing(trained: Path, shell: Shell, stdin: Stdin) -> None:
    wrong = ["/depth 9", "/depth oracle", "/temperature hot", "/temperature -1", "/rest", "", "the \udcff"]
    stdin("\n".join([*wrong, "the river"]).encode(errors="surrogateescape"))
    result = shell("chat", trained, *DRAWS)
    sentences = ["takes 1 to 3", "later tokens", "'hot' must be a number", "temperature -1.0 must be 0"]
    sentences += ["did you mean '/reset'", "no text yet", "not valid UTF-8"]
    for sentence, error in zip(sentences, result.err.splitlines(), strict=True):
        assert sentence in error and error.startswith("error: ")
    stdin(b"the river")
    assert result.code == 1 and result.out == shell.succeeds("chat", trained, *DRAWS).out


def test_a_text_that_outgrows_the_cache_is_refused_and_stays(trained: Path, shell: Shell, stdin: Stdin) -> None:
    stdin(b"the river\n" + b"the people " * 400 + b"\n and\n")
    result = shell("chat", trained, "--max-new-tokens", "3", "--cache-bytes", "256kB", "--seed", "1")
    assert result.code == 1 and re.fullmatch(r"error: .* pages, .*; or begin a new text with /reset\n", result.err)
    stdin(b"the river\n and\n")
    assert result.out == shell.succeeds("chat", trained, "--max-new-tokens", "3", "--seed", "1").out


def test_chat_refuses_what_generate_refuses(trained: Path, shell: Shell, stdin: Stdin) -> None:
    stdin(b"the river\n")
    assert "top_p 1.5" in shell.refuses("chat", trained, "--top-p", "1.5")
    assert "neither a run folder" in shell.refuses("chat", "nowhere")
    assert "--cache-bytes '0'" in shell.refuses("chat", trained, "--cache-bytes", "0")


class Scripted(Conversation):
    """A conversation whose answers are given."""

    deepest = 3

    def __init__(self, answers: list[list[Event]]) -> None:
        self.answers = iter(answers)

    def turn(self, text: str) -> Generator[Event]:
        yield from next(self.answers)


def events(*pieces: tuple[str, float | None]) -> list[Event]:
    return [Event(0, 1, text, depth=depth) for text, depth in pieces]


def screens(show_depth: bool, colours: bool) -> tuple[Display, io.StringIO, io.StringIO]:
    display, answers, said = Display(show_depth), io.StringIO(), io.StringIO()
    options: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor"} if colours else {"width": 200}
    display.answers = Console(file=answers, no_color=not colours, **options)
    display.said = Console(file=said, width=200)
    return display, answers, said


TURNS = [events(("the", 1), (" riv", 3), ("", 2), ("er", 2)), events(("\n.", 0))]


def test_depth_is_a_small_number_without_colours() -> None:
    display, answers, said = screens(show_depth=True, colours=False)
    Chat(Scripted(TURNS), display, is_interactive=False).run(iter(["a", "b"]))
    assert answers.getvalue() == "the₁ riv₃er₂\n\n.₀\n"
    legend, first, second = said.getvalue().splitlines()
    assert "depth, 0 to 3" in legend
    assert re.fullmatch(r"mean depth 2\.00 of 3, 2\.00 so far; 4 tokens, [\d,]+ tokens/s", first)
    assert re.fullmatch(r"mean depth 0\.00 of 3, 1\.60 so far; 1 tokens, [\d,]+ tokens/s", second)


def test_depth_is_a_colour_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    display, answers, said = screens(show_depth=True, colours=True)
    Chat(Scripted(TURNS), display, is_interactive=False).run(iter(["a", "b"]))
    coloured = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+)m([^\x1b]*)\x1b\[0m", answers.getvalue())
    shades = {text: tuple(map(int, rgb)) for *rgb, text in coloured}
    assert list(shades) == ["the", " riv", "er", "\n."]
    assert shades["\n."] == PALETTE[0] and shades[" riv"] == PALETTE[-1] and len(set(shades.values())) == 4
    assert said.getvalue().startswith("depth 0 1 2 3\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Display(show_depth=True).has_colours


def test_without_being_asked_for_depth_is_not_shown_and_terminals_are_safe() -> None:
    display, answers, said = screens(show_depth=False, colours=True)
    Chat(Scripted([events(("a\x1b[2J\x07b\tc\n", 2))]), display, is_interactive=False).run(iter(["a"]))
    assert answers.getvalue() == "a\ufffd[2J\ufffdb\tc\n\n" and said.getvalue() == ""


def test_colours_are_ordered_and_readable_on_black_and_on_white() -> None:
    def luminance(rgb: tuple[int, int, int]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    shades = [colour(depth, 32).color for depth in range(33)]
    values = [luminance(tuple(shade.triplet)) for shade in shades if shade is not None and shade.triplet is not None]
    assert len(values) == 33 and values == sorted(values)
    assert all(1.05 / (value + 0.05) >= 3 and (value + 0.05) / 0.05 >= 3 for value in values)
    assert colour(7, 3) == colour(3, 3) and colour(0, 0) == colour(0, 3)
    assert len({colour(depth, 3, few=True) for depth in range(4)}) == 4


def test_ctrl_c_stops_an_answer_and_keeps_the_text(trained: Path) -> None:
    model, tokenizer = morex.load(trained)
    talk = Conversation(Engine(model, tokenizer, cache_bytes=2**22), Params(max_new_tokens=8))
    display, _, _ = screens(show_depth=False, colours=False)
    seen: list[Event] = []

    def interrupting(event: Event) -> None:
        seen.append(event)
        if len(seen) == 3:
            raise KeyboardInterrupt

    display.piece = interrupting  # type: ignore[method-assign]
    Chat(talk, display, is_interactive=True).run(iter(["the river"]))
    prompt = tokenizer.encode("the river")
    assert len(talk.tokens) == len(prompt) + 3 and talk.engine.is_idle and not talk.engine.requests
    whole = model.generate([prompt], max_new_tokens=11)[0]
    assert talk.tokens == whole[: len(prompt) + 3]
    Chat(talk, Display(show_depth=False), is_interactive=True).run(iter([""]))
    assert talk.tokens == whole
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        Chat(talk, display, is_interactive=False).run(iter([" and"]))


def test_typed_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script: Iterator[str | type[BaseException]] = iter(
        ["one", "two\\", "three", "four\\", KeyboardInterrupt, "five", EOFError]
    )
    prompts: list[str] = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        line = next(script)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", answer)
    assert list(typed()) == ["one", "two\nthree", "five"]
    assert prompts == ["> ", "> ", ". ", "> ", ". ", "> ", "> "]
    assert capsys.readouterr().out == "\n\n"


def test_a_terminal_gets_a_prompt_and_keeps_the_session(
    trained: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    script = iter(["the river", "/quit"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda prompt: next(script))
    result = shell.succeeds("chat", trained, "--max-new-tokens", "3", "--temperature", "0")
    model, tokenizer = morex.load(trained)
    text = tokenizer.decode(model.generate([tokenizer.encode("the river")], max_new_tokens=3)[0])
    assert "the river" + result.out == text + "\n"
    assert "/help lists the commands" in result.err
