"""Progress on stderr: a bar with tokens/s and time left on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 15  # between lines when stderr is not a terminal


class ConsoleReporter:
    """Implements :class:`persona_axis.pipeline.Reporter`."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        self.console.print(text, style="yellow" if self.console.is_terminal else None, markup=False)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        show = self._bar if self.console.is_terminal else self._lines
        with show(name, total) as step:
            yield step

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total, rate="")
            start, made = time.monotonic(), 0

            def step(tokens: int) -> None:
                nonlocal made
                made += tokens
                seconds = time.monotonic() - start
                rate = f"{made / seconds:,.0f} tokens/s" if made and seconds > 0 else ""
                progress.update(task, advance=1, rate=rate)

            yield step

    @contextmanager
    def _lines(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        start = said = time.monotonic()
        done = made = 0

        def step(tokens: int) -> None:
            nonlocal done, made, said
            done, made = done + 1, made + tokens
            now = time.monotonic()
            if now - said >= LINE_SECONDS and done < total:
                said = now
                left = (now - start) / done * (total - done)
                self.console.print(f"{name}: {done}/{total}{_rate(made, now - start)}, about {left:.0f} s left")

        yield step
        seconds = time.monotonic() - start
        self.console.print(f"{name}: {done}/{total} in {seconds:.0f} s{_rate(made, seconds)}")


def _rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:,.0f} tokens/s" if tokens and seconds > 0 else ""
