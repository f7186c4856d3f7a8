"""The text of a continuation while it grows: only what is certain is handed out, and it ends before a stop string."""

from collections.abc import Sequence

from morex.data.encoding import UNKNOWN, Tokenizer

CONTEXT = 8
"""Tokens before the new ones that are decoded with them: a tokenizer may write a token otherwise where it is the first
one, and the bytes of a character may be in four."""
WINDOW = 32
"""Tokens that are decoded at a time, more only in the middle of a character."""
HALF = 3
"""Places at the end of a text that half a character may take."""


class GrowingText:
    """Tokens to text, piece by piece: pieces never hold half a character, nor a beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """Args:
        tokenizer: of the tokens.
        prompt: tokens that the text continues; a half character at their end is part of the text.
        stop: strings before which the text ends.
        """
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.has_stopped = False
        """Whether a stop string has come."""
        self.text = ""
        """All pieces so far."""
        self._window = list(prompt[-WINDOW:])
        self._taken = _certain(tokenizer.decode(self._window))
        """Characters of the window's text that are known further on."""
        self._held = ""
        """Certain as text, and perhaps the beginning of a stop string."""

    def add(self, token: int) -> str:
        """The piece that is certain now that this token has come."""
        self._window.append(token)
        text = self.tokenizer.decode(self._window)
        end = _certain(text)
        new = text[self._taken : end]
        self._taken = max(self._taken, end)
        if len(self._window) >= WINDOW and end == len(text):
            self._shorten(text)
        return self._hand_out(new)

    def finish(self) -> str:
        """What is left where nothing more comes."""
        if self.has_stopped:
            return ""
        new = self.tokenizer.decode(self._window)[self._taken :]
        self._window, self._taken = [], 0
        return self._hand_out(new, is_last=True)

    def _hand_out(self, new: str, is_last: bool = False) -> str:
        if self.has_stopped:
            return ""
        text = self._held + new
        # Where several are there, that which is complete first, and of these the longest.
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stop if stop in text]
        if found:
            self.has_stopped = True
            end = min(found)[1]
        else:
            end = len(text) - (0 if is_last else self._beginning(text))
        piece, self._held = text[:end], text[end:]
        self.text += piece
        return piece

    def _beginning(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = max(map(len, self.stop), default=0)
        for size in range(min(len(text), longest - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stop):
                return size
        return 0

    def _shorten(self, text: str) -> None:
        """Goes on from the last tokens alone, from the first that is not the middle of a character."""
        for size in range(CONTEXT, CONTEXT + HALF + 1):
            tokens = self._window[-size:]
            short = self.tokenizer.decode(tokens)
            if short and text.endswith(short):
                self._window, self._taken = tokens, len(short)
                return


def _certain(text: str) -> int:
    """Characters that stay whatever comes: half a character is decoded as unknown, at the end."""
    held = 0
    while held < min(HALF, len(text)) and text[len(text) - held - 1] == UNKNOWN:
        held += 1
    return len(text) - held
