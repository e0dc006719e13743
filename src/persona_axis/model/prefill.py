"""Filling slots with given tokens, each shared prefix computed once.

Used by the decoding loop (prompts) and by scoring (replies after the same prompt). Only for models on which the loop
has proven itself: it rests on the same cache, mask and attention.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from persona_axis.model.attention import causal_mask
from persona_axis.model.cache import SlotCache
from persona_axis.model.layers import main_device, text_decoder
from persona_axis.model.loading import ChatModel
from persona_axis.model.tokens import Announcement, Mark, announced, stretches

PREFIX_BYTES = 1 << 29  # keys and values of prefixes kept for later batches
# Tokens that one forward should have: fewer waste the matrix products, more are padded to longer rows than need be.
GROUP_TOKENS = {"cpu": 384, "device": 8192}

Prefix = tuple[tuple[int, ...], tuple[Mark, ...]]  # token ids, and which of them are of what kind


class Prefiller:
    """Slots of one model, and the prefixes computed for them."""

    def __init__(self, chat: ChatModel, prefix_bytes: int | None = None) -> None:
        self.decoder = text_decoder(chat.model)
        self.device = main_device(chat.model)
        self.cache = SlotCache(len(chat.blocks), 1, 1, self.device)
        self.prefix_bytes = PREFIX_BYTES if prefix_bytes is None else prefix_bytes
        self.prefixes: OrderedDict[Prefix, list[tuple[Tensor, Tensor]]] = OrderedDict()

    def fill(
        self,
        first: int,
        sequences: Sequence[tuple[int, ...]],
        shared: Sequence[int],
        marks: Sequence[Sequence[Mark]],
    ) -> Tensor | None:
        """Run ``sequences`` into slots ``first..``; the first ``shared[i]`` tokens of each come from its prefix.

        Slots ``first..first + len(sequences) - 1`` must exist and be free. ``marks[i]`` say of what kind the tokens of
        sequence i are (:mod:`persona_axis.model.tokens`).

        Returns:
            Final hidden states of the tokens after the prefixes, ``[rows, width, d_model]`` (rows shorter than
            ``width`` end in padding); None when no sequence has any.
        """
        prefixes = [_prefix(s, n, mine) for s, n, mine in zip(sequences, shared, marks, strict=True)]
        self._compute([prefix for prefix, n in zip(prefixes, shared, strict=True) if n > 0], first)
        for i, (prefix, n) in enumerate(zip(prefixes, shared, strict=True)):
            if n > 0:
                self.cache.insert(torch.tensor([first + i], device=self.device), self.prefixes[prefix])
        rests = [s[n:] for s, n in zip(sequences, shared, strict=True)]
        if not any(rests):
            return None
        return self._forward(first, list(shared), rests, marks)

    def _compute(self, wanted: list[Prefix], first: int) -> None:
        """Store the prefixes that are not stored yet, computed in slots about to be filled."""
        distinct = list(dict.fromkeys(wanted))
        missing = [p for p in distinct if p not in self.prefixes]
        if missing:
            self._forward(first, [0] * len(missing), [ids for ids, _ in missing], [marks for _, marks in missing])
        for i, prefix in enumerate(missing):
            self.prefixes[prefix] = self.cache.extract(first + i, len(prefix[0]))
        for prefix in distinct:
            self.prefixes.move_to_end(prefix)
        while len(self.prefixes) > len(distinct) and sum(map(_size, self.prefixes.values())) > self.prefix_bytes:
            self.prefixes.popitem(last=False)

    def _forward(
        self,
        first: int,
        starts: list[int],
        tokens: Sequence[tuple[int, ...]],
        marks: Sequence[Sequence[Mark]],
    ) -> Tensor:
        """Run ``tokens[i]`` into slot ``first + i`` from position ``starts[i]``; rows of like length go together."""
        least = GROUP_TOKENS["cpu" if self.device.type == "cpu" else "device"]
        groups = list(like_lengths([len(t) for t in tokens], least))
        parts = []
        for rows in groups:
            these, lengths = [starts[i] for i in rows], [len(tokens[i]) for i in rows]
            kinds = partial(stretches, these, lengths, [marks[i] for i in rows])
            with announced(Announcement(lambda *_, kinds=kinds: kinds())):
                parts.append(self._forward_rows([first + i for i in rows], these, [tokens[i] for i in rows]))
        if len(parts) == 1 and groups[0] == list(range(len(tokens))):
            return parts[0]
        width = max(part.shape[1] for part in parts)
        hidden = parts[0].new_zeros(len(tokens), width, parts[0].shape[-1])
        for rows, part in zip(groups, parts, strict=True):
            hidden[rows, : part.shape[1]] = part
        return hidden

    def _forward_rows(self, slots: list[int], starts: list[int], tokens: Sequence[tuple[int, ...]]) -> Tensor:
        width = max(len(t) for t in tokens)
        ids = torch.zeros(len(tokens), width, dtype=torch.long)
        for row, t in zip(ids, tokens, strict=True):
            row[: len(t)] = torch.tensor(t, dtype=torch.long)
        if max(starts) + width > self.cache.capacity:  # padding of the shorter rows
            self.cache.resize(self.cache.slots, max(starts) + width)
        positions = self.cache.begin_prefill(
            torch.tensor(slots, device=self.device), torch.tensor(starts, device=self.device), width
        )
        out = self.decoder(
            input_ids=ids.to(self.device),
            attention_mask=causal_mask(positions, self.cache.width),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden


def like_lengths(lengths: Sequence[int], least: int) -> Iterator[list[int]]:
    """Indices by ascending length, in groups of at least ``least`` padded tokens (the last takes what is left).

    Rows of no tokens are in none.
    """
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i])
    group: list[int] = []
    for place, i in enumerate(order):
        group.append(i)
        left = sum(lengths[j] for j in order[place + 1 :])
        if len(group) * lengths[i] >= least and left >= least:
            yield group
            group = []
    if group:
        yield group


def _prefix(token_ids: tuple[int, ...], n: int, marks: Sequence[Mark]) -> Prefix:
    """The first ``n`` tokens; the same ids of another kind are another prefix."""
    return token_ids[:n], tuple((start, min(end, n), kind) for start, end, kind in marks if start < n)


def _size(prefix: list[tuple[Tensor, Tensor]]) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in prefix)
