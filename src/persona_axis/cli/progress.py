"""Progress on stderr: a bar with tokens/s and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_SECONDS = 15  # between lines when stderr is not a terminal
KNOWN_LENGTHS = 50  # finished replies after which their mean length is believed


class _Stage:
    """Counts a stage's steps and tokens. Implements :class:`persona_axis.pipeline.Stage`."""

    def __init__(self, total: int, tokens_each: int) -> None:
        self.total = total
        self.tokens_each = tokens_each
        self.steps = self.tokens = self.finished_tokens = 0
        self.start = time.monotonic()

    def done(self, tokens: int = 0) -> None:
        self.steps += 1
        self.finished_tokens += tokens
        self.show()

    def made(self, tokens: int) -> None:
        self.tokens += tokens
        self.show()

    def show(self) -> None:
        """Overridden by what draws."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def rate(self) -> str:
        return f"{self.tokens / self.seconds:,.0f} tokens/s" if self.tokens and self.seconds > 0 else ""

    def left(self) -> str:
        """Time left: by tokens where they are made (hundreds of replies may be under way and none finished yet)."""
        done, all_of_it = float(self.steps), float(self.total)
        if self.tokens and self.tokens_each:
            known = self.steps >= KNOWN_LENGTHS
            each = self.finished_tokens / self.steps if known else float(self.tokens_each)
            done, all_of_it = float(self.tokens), max(float(self.tokens), each * self.total)
        if not done or self.steps >= self.total:
            return ""
        seconds = round(self.seconds / done * (all_of_it - done))
        return f"about {seconds // 60} min {seconds % 60} s left" if seconds >= 60 else f"about {seconds} s left"


class _BarStage(_Stage):
    def __init__(self, progress: Progress, task: TaskID, total: int, tokens_each: int) -> None:
        super().__init__(total, tokens_each)
        self.progress = progress
        self.task = task

    def show(self) -> None:
        self.progress.update(self.task, completed=self.steps, rate=self.rate(), left=self.left())


class _LineStage(_Stage):
    def __init__(self, console: Console, name: str, total: int, tokens_each: int) -> None:
        super().__init__(total, tokens_each)
        self.console = console
        self.name = name
        self.said = self.start

    def show(self) -> None:
        now = time.monotonic()
        if now - self.said >= LINE_SECONDS and self.steps < self.total:
            self.said = now
            said = [f"{self.name}: {self.steps}/{self.total}", self.rate(), self.left()]
            self.console.print(", ".join(part for part in said if part))

    def close(self) -> None:
        said = [f"{self.name}: {self.steps}/{self.total} in {self.seconds:.0f} s", self.rate()]
        self.console.print(", ".join(part for part in said if part))


class ConsoleReporter:
    """Implements :class:`persona_axis.pipeline.Reporter`."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        self.console.print(text, style="yellow" if self.console.is_terminal else None, markup=False)

    @contextmanager
    def stage(self, name: str, total: int, tokens_each: int = 0) -> Iterator[_Stage]:
        if not self.console.is_terminal:
            line = _LineStage(self.console, name, total, tokens_each)
            yield line
            line.close()
            return
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total, rate="", left="")
            yield _BarStage(progress, task, total, tokens_each)
