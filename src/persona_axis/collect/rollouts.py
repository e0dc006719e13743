"""Generating the plan's rollouts into shards. Finished replies are journalled at once: a kill loses those in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from persona_axis.collect.plan import PlanRow
from persona_axis.collect.rundir import ROLLOUT_SCHEMA, RunDir, shard_name
from persona_axis.files.atomic import make_folder
from persona_axis.files.journal import Journal
from persona_axis.files.shards import write_shard
from persona_axis.model.engine import Engine, OnTokens, Reply, Request, Sampling, nobody
from persona_axis.model.loading import ChatModel

OnReply = Callable[[int], None]  # called with the reply's token count


@dataclass(frozen=True, slots=True)
class Generated:
    """What one call of :func:`generate_rollouts` did."""

    rollouts: int
    tokens: int


class _OpenShard:
    """A shard whose rollouts are being made: its journal, and what is finished so far."""

    def __init__(self, run: RunDir, shard: int, rows: list[PlanRow]) -> None:
        self.run = run
        self.shard = shard
        self.rows = {row.key: row for row in rows}
        self.journal = Journal(run.rollouts / f"{shard_name(shard)}.journal", run.config_hash)
        self.records = {header["key"]: (header, arrays) for header, arrays in self.journal.read()}

    def missing(self) -> list[PlanRow]:
        return [row for key, row in self.rows.items() if key not in self.records]

    def add(self, header: dict[str, object], arrays: dict[str, np.ndarray]) -> None:
        self.journal.append(header, arrays)
        self.records[str(header["key"])] = (header, arrays)

    def finish(self) -> bool:
        """Write the shard if all of it is there."""
        if len(self.records) < len(self.rows):
            return False
        rows, activations = [], []
        for key, row in self.rows.items():
            header, arrays = self.records[key]
            rows.append(
                {
                    **header,
                    "persona": row.persona,
                    "question_index": row.question_index,
                    "block": row.block,
                    "reply_ids": arrays["reply_ids"],
                    "logprobs": arrays["logprobs"],
                }
            )
            activations.append(arrays["activation"])
        self.journal.sync()
        arrays_out = {"activations": np.stack(activations)}
        write_shard(
            self.run.rollouts,
            shard_name(self.shard),
            rows,
            ROLLOUT_SCHEMA,
            arrays_out,
            self.run.config_hash,
        )
        self.journal.delete()
        return True


def generate_rollouts(
    run: RunDir,
    chat: ChatModel,
    engine: Engine,
    sampling: Sampling,
    shards: range | None = None,
    on_reply: OnReply = nobody,
    on_tokens: OnTokens = nobody,
) -> Generated:
    """Make every rollout of ``shards`` (default: all) that is not there yet.

    Shards that exist are not opened. Replies of a shard under way are in its journal as soon as they are finished.
    """
    make_folder(run.rollouts)
    width = (len(engine.layers), chat.d_model)
    opened: dict[int, _OpenShard] = {}
    shard_of: dict[str, tuple[int, int]] = {}  # key -> shard, prompt length
    done = tokens = 0

    def requests() -> Iterator[Request]:
        for shard, rows in run.plan.shards():
            if (shards is not None and shard not in shards) or run.has_rollouts(shard):
                continue
            current = _OpenShard(run, shard, rows)
            if current.finish():  # killed between the last reply and the shard
                continue
            opened[shard] = current
            for request in shard_requests(chat, current.missing()):
                shard_of[request.key] = shard, len(request.prompt_ids)
                yield request

    for reply in engine.generate(requests(), sampling, on_tokens):
        shard, prompt_tokens = shard_of.pop(reply.key)
        current = opened[shard]
        header, arrays = _record(chat, reply, prompt_tokens, width)
        current.add(header, arrays)
        if current.finish():
            del opened[shard]
        done += 1
        tokens += len(reply.token_ids)
        on_reply(len(reply.token_ids))
    return Generated(done, tokens)


def shard_requests(chat: ChatModel, rows: list[PlanRow]) -> list[Request]:
    """Requests with the token prefix that rows under the same system prompt share."""
    ids = [chat.template.prompt_ids(chat.template.messages(r.system_prompt, r.question)) for r in rows]
    groups: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    for row, prompt in zip(rows, ids, strict=True):
        groups.setdefault((row.persona, row.prompt_index), []).append(prompt)
    shared = {group: _common_prefix(prompts) for group, prompts in groups.items()}
    return [
        Request(row.key, prompt, min(shared[row.persona, row.prompt_index], len(prompt) - 1))
        for row, prompt in zip(rows, ids, strict=True)
    ]


def _common_prefix(prompts: list[tuple[int, ...]]) -> int:
    """Leading tokens all have in common; 0 when there is nothing to share with."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    return n


def _record(
    chat: ChatModel, reply: Reply, prompt_tokens: int, width: tuple[int, int]
) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    content = content_ids(reply.token_ids, reply.content_start, reply.finish_reason)
    header: dict[str, object] = {
        "key": reply.key,
        "prompt_tokens": prompt_tokens,
        "content_start": reply.content_start,
        "n_counted": reply.n_counted,
        "finish_reason": reply.finish_reason,
        "text": chat.decode(content.tolist()),
    }
    # A reply without a counted token has no activation; n_counted = 0 keeps its zeros out of every mean.
    activation = np.zeros(width, np.float32) if reply.activation is None else reply.activation.numpy()
    arrays = {
        "activation": activation.astype(np.float32),
        "reply_ids": reply.token_ids,
        "logprobs": reply.logprobs,
    }
    return header, arrays


def content_ids(token_ids: np.ndarray, content_start: int, finish_reason: str) -> np.ndarray:
    """The reply's content: without thinking and without the end-of-turn token."""
    return token_ids[content_start : len(token_ids) - (finish_reason == "stop")]
