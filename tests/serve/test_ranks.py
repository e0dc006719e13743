"""A model on several devices: tensor ranks that each hold the whole stream, and pipeline stages of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from small_policies import WIDTH, made

from persona_axis.serve.vllm.bank import Bank
from persona_axis.serve.vllm.frontend import joined
from persona_axis.serve.vllm.held import HeldModel
from persona_axis.serve.vllm.keys import Ticket

N_LAYERS, TOKENS, COUNTED = 4, 6, 4
POLICY = made(3, (0, 2, 3), "all")
TICKET = Ticket("p", POLICY.content_hash, 1.0, capture=True, projections=True).to_dict()


Streams = dict[tuple[int, int], list[float]]


def ran(layers: Sequence[int]) -> tuple[Streams, dict[str, Any]]:
    """What a rank with these layers makes of the same streams, by token and layer, and what it collected."""
    held = HeldModel(Bank(layers, N_LAYERS, WIDTH, 1, 1, torch.device("cpu")), 8, 1)
    held.bank.load("p", POLICY)
    held.begin([], [("r", TICKET, 1)])
    streams, random = {}, torch.Generator()
    for token in range(TOKENS):
        held.fill(["r"], np.array([0, 1]), np.array([token]), 1)
        for layer in layers:
            hidden, residual = torch.randn(2, 1, WIDTH, generator=random.manual_seed(100 * layer + token))
            held.run(hidden, residual, layer)
            streams[token, layer] = (hidden + residual)[0].tolist()
    return streams, held.fetch("r", COUNTED)


def test_tensor_ranks_do_and_collect_the_same() -> None:
    (streams, one), (others, other) = ran(range(N_LAYERS)), ran(range(N_LAYERS))
    assert streams == others
    assert one == other
    assert joined([one, other], COUNTED) == joined([one], COUNTED)


def test_pipeline_stages_together_are_the_whole_model() -> None:
    (streams, whole), (first, early), (second, late) = ran(range(N_LAYERS)), ran((0, 1)), ran((2, 3))
    assert streams == first | second
    assert joined([late, early], COUNTED) == joined([whole], COUNTED)
    assert joined([late, early], COUNTED)["projections"].keys() == {"0", "2", "3"}
