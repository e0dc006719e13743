"""``chat``: a conversation at the terminal, or from a pipe, with each reply's place on the axis."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_axis.cli.app import INTERRUPTED, app
from persona_axis.cli.replies import (
    AllowModel,
    Device,
    Dtype,
    Folder,
    Layer,
    Model,
    Seed,
    System,
    TopP,
    UnitOption,
    opened,
    reply_facts,
)
from persona_axis.cli.terminal import Wrapped, can_show, dim, interrupts
from persona_axis.errors import PartialRun, PersonaAxisError, UsageError

if TYPE_CHECKING:
    from persona_axis.cli.holding import Intervened
    from persona_axis.model.dialogue import Dialogue
    from persona_axis.model.streaming import StreamedReply

HELP = """\
/help          these lines
/reset         forget the conversation; the system prompt stays
/system TEXT   another system prompt from here on; without TEXT, none
/plain         leave the intervention out, or put it back
/save FILE     the conversation so far, as .json or .jsonl
/quit          leave (Ctrl-D does, too)
//...          a message that begins with one slash
Ctrl-C stops a reply; at the prompt it leaves."""


@app.command()
def chat(
    folder: Folder,
    policy: Annotated[
        Path | None, typer.Option(help="Hold the model: a policy folder, or a run folder with one.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Steer along the axis: positive = toward the Assistant, negative = away.")
    ] = None,
    unit: UnitOption = "raw",
    layer: Layer = None,
    system: System = "",
    max_tokens: Annotated[int, typer.Option(help="Limit of each reply.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: TopP = 0.9,
    seed: Seed = 0,
    allow_model: AllowModel = None,
    model: Model = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per reply.")] = False,
) -> None:
    """Talk with a model and see where each reply lies on the axis, plain, steered or held.

    Projections are read at the analysed layer, before an intervention acts there. /help lists the commands inside.

    From a pipe, each line is a message or a command; the exit code is 3 when some could not be answered.

    The same seed and messages give the same replies, in float32 at least.
    """
    from persona_axis.cli import holding
    from persona_axis.geometry.axis import Axis
    from persona_axis.model.dialogue import Dialogue
    from persona_axis.steering.policy import Policy

    if strength is not None and policy is not None:
        raise UsageError("Give --policy or --strength, not both.")
    if strength is None and layer is not None:
        raise UsageError("--layer says where to steer; --strength must say how far.")
    axis = Axis.load(folder)
    axis.at(layer)
    sampling = holding.sampling_of(max_tokens, temperature, top_p, seed)
    wanted = Policy.load(policy) if policy is not None else None
    if sys.stdin.isatty():
        typer.echo(dim("Loading the model ...", sys.stderr), err=True)
    stream = opened(folder, axis, model, dtype, device)
    way = None
    if wanted is not None:
        way = holding.capped(stream.chat, wanted, allow_model)
    elif strength is not None:
        way = holding.steered(stream.chat, axis, layer, strength, unit)
    dialogue = Dialogue(stream, sampling, system, way.hold if way is not None else None)
    _Session(dialogue, way, as_json).run()


class _Session:
    """Reads messages and commands, and shows replies."""

    def __init__(self, dialogue: Dialogue, way: Intervened | None, as_json: bool) -> None:
        self.dialogue = dialogue
        self.way = way
        self.as_json = as_json
        self.terminal = sys.stdin.isatty()
        self.unanswered = 0

    def run(self) -> None:
        self._greet()
        try:
            for line in self._lines():
                if line == "/quit":
                    break
                try:
                    self._take(line)
                except PersonaAxisError as e:
                    self.unanswered += 1
                    self._say(f"persona-axis: {e}")
        except KeyboardInterrupt:
            typer.echo(err=True)
            raise SystemExit(INTERRUPTED) from None
        if self.unanswered and not self.terminal:
            raise PartialRun(f"{self.unanswered} of the lines could not be answered; see above.")

    def _greet(self) -> None:
        stream = self.dialogue.stream
        how = self.way.words if self.way is not None else "plain"
        help = " /help lists the commands." if self.terminal else ""
        self._say(f"{stream.chat.name}, {stream.chat.dtype}, {how}; read at layer {stream.layer}.{help}")
        if self.way is not None and self.way.note:
            self._say(f"note: {self.way.note}")

    def _lines(self) -> Iterator[str]:
        """What the user says, line by line; empty lines are left out."""
        if self.terminal:
            with suppress(ImportError):  # Windows has none
                import readline  # noqa: F401  (lets input() edit and recall lines)

        while True:
            try:
                line = input("\n> ") if self.terminal else sys.stdin.readline()
            except EOFError:
                typer.echo()
                return
            if not self.terminal and not line:
                return
            if line.strip():
                yield line.strip()

    # ---- commands ---------------------------------------------------------------------------------------

    def _take(self, line: str) -> None:
        if line.startswith("//") or not line.startswith("/"):
            self._answer(line[1:] if line.startswith("//") else line)
            return
        word, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "reset": self._reset,
            "system": self._system,
            "plain": self._plain,
            "save": self._save,
        }
        if word not in commands:
            raise UsageError(f"There is no command /{word}; /help lists those there are.")
        if rest and word not in ("system", "save"):
            raise UsageError(f"/{word} takes nothing after it.")
        commands[word](rest.strip())

    def _help(self, rest: str) -> None:
        self._say(HELP)

    def _reset(self, rest: str) -> None:
        self.dialogue.reset()
        self._say("A new conversation.")

    def _system(self, text: str) -> None:
        self.dialogue.system = text
        self._say("The system prompt is set." if text else "There is no system prompt now.")

    def _plain(self, rest: str) -> None:
        if self.way is None:
            raise UsageError("Nothing holds this model: the chat was started without --policy or --strength.")
        held = self.dialogue.hold is not None
        self.dialogue.hold = None if held else self.way.hold
        self._say("Plain from here on." if held else f"From here on {self.way.words}.")

    def _save(self, file: str) -> None:
        from persona_axis.catalog.transcripts import write_transcripts

        if not file:
            raise UsageError("/save needs a file name that ends in .json or .jsonl.")
        if not self.dialogue.turns:
            raise UsageError("There is nothing to save yet.")
        steering = self.way.facts if self.way is not None else None
        write_transcripts(Path(file).expanduser(), [self.dialogue.transcript(steering)])
        self._say(f"{len(self.dialogue.turns)} turns in {file}")

    # ---- replies ----------------------------------------------------------------------------------------

    def _answer(self, message: str) -> None:
        told = Wrapped(shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
        with interrupts() as interrupted:
            reply = self.dialogue.say(message, _quiet if self.as_json else told.write, interrupted)
        told.finish()
        if self.as_json:
            self._show_json(message, reply)
            return
        if reply.token_ids:
            self._show_figures(reply)
        self._say_how_it_ended(reply)

    def _show_json(self, message: str, reply: StreamedReply) -> None:
        way = self.way if self.dialogue.hold is not None else None
        facts = reply_facts(self.dialogue.stream, reply, way)
        row = {"turn": len(self.dialogue.turns), "message": message, "system": self.dialogue.system, **facts}
        typer.echo(json.dumps({**row, "projections": list(reply.projections)}))

    def _show_figures(self, reply: StreamedReply) -> None:
        from persona_axis.report.streamed import BLOCKS, PLAIN_BLOCKS, curves, figures

        stream = self.dialogue.stream
        shares = self.way is not None and self.way.policy is not None and self.dialogue.hold is not None
        lines = [figures(stream.axis, stream.layer, reply, shares)]
        if reply.projections:
            turns = [p for turn in self.dialogue.turns if (p := turn.reply.projection) is not None]
            blocks = BLOCKS if can_show(BLOCKS) else PLAIN_BLOCKS
            lines.append(curves(stream.axis, stream.layer, reply, turns, blocks))
        for line in lines:
            typer.echo(dim(f"  {line}"))
        if not self.terminal:
            typer.echo()

    def _say_how_it_ended(self, reply: StreamedReply) -> None:
        limit = self.dialogue.sampling.max_tokens
        said = {
            "length": f"Cut at --max-tokens {limit}.",
            "context": "Cut: the model's context is full. /reset starts a new conversation.",
            "interrupted": "Stopped."
            if reply.token_ids
            else "Stopped before the reply began; the message is taken back.",
        }
        if reply.ended in said:
            self._say(said[reply.ended])

    def _say(self, text: str) -> None:
        """Talk: to stderr, set off from the reply on a terminal."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 2
            text = "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in text.splitlines())
        typer.echo(dim(text, sys.stderr), err=True)


def _quiet(text: str) -> None:
    pass
