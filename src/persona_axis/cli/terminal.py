"""What a terminal needs: words wrapped as they come, Ctrl-C as a request, faint text where it can be shown."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


class Wrapped:
    """Writes a growing text to stdout, whole words to a line; ``columns`` None leaves lines as they are."""

    def __init__(self, columns: int | None) -> None:
        self.columns = columns
        self.column = 0
        self.gap = 0  # spaces that are due before the next word
        self.word = ""
        self.torn = False  # the beginning of this word is written: it filled a line
        self.begun = False

    def write(self, piece: str) -> None:
        if not self.begun:  # a reply's leading blank lines say nothing
            piece = piece.lstrip()
            self.begun = bool(piece)
        if self.columns is None:
            _put(piece)
            return
        for character in piece:
            if character.isspace():
                self._end_word()
                self.torn = False
                self._space(character)
            else:
                self.word += character
        if _cells(self.word) >= self.columns:  # its end is not worth waiting for
            self._end_word()
            self.torn = True

    def finish(self) -> None:
        self._end_word()
        if self.begun:
            _put("\n")

    def _space(self, character: str) -> None:
        if character == "\n":
            _put("\n")
            self.column = self.gap = 0
        else:
            self.gap += 1

    def _end_word(self) -> None:
        if not self.word or self.columns is None:
            return
        width = _cells(self.word)
        if self.column and not self.torn and self.column + self.gap + width > self.columns:
            _put("\n")
            self.column = self.gap = 0
        _put(" " * self.gap + self.word)
        self.column += self.gap + width
        if self.column > self.columns:  # the terminal broke it
            self.column = (self.column - 1) % self.columns + 1
        self.gap, self.word = 0, ""


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _put(text: str) -> None:
    typer.echo(text, nl=False)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, a first Ctrl-C makes the function given return True; a second one interrupts."""
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def dim(text: str, stream: Any = None) -> str:
    """Fainter on a terminal that takes it."""
    shown = (stream or sys.stdout).isatty() and "NO_COLOR" not in os.environ
    return typer.style(text, dim=True) if shown else text


def can_show(text: str) -> bool:
    """Whether stdout can write these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
