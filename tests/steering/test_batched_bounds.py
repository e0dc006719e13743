"""Bounds for each sequence of a batch: as if every row had been alone with its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from forwards import LAYERS, SLACK, WIDTH, an_axis, floors_between, generated, logits, outputs
from torch import Tensor

from persona_axis.errors import UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Request, Sampling
from persona_axis.model.fallback import GenerateEngine
from persona_axis.model.loading import ChatModel
from persona_axis.model.reading import Passage, read_passages, residual_norms, score_passages
from persona_axis.steering import interventions
from persona_axis.steering.hooks import cap, held, steer
from persona_axis.steering.policy import Policy

Tiny = Callable[..., ChatModel]
ROWS = torch.arange(3, 48).reshape(3, 15)
STRENGTHS = (9.0, 0.0, -6.0)


@pytest.fixture(params=["llama", "gpt2", "qwen3_moe"])
def chat(request: pytest.FixtureRequest, tiny: Tiny) -> ChatModel:
    return tiny(request.param)


@pytest.fixture
def axis() -> Axis:
    return an_axis()


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]  # [batch, 1]


def test_each_row_has_its_own_strength(chat: ChatModel, axis: Axis) -> None:
    plain = logits(chat, ROWS)
    with steer(chat, axis, strength=column(*STRENGTHS)):
        together = logits(chat, ROWS)
    for row, strength in enumerate(STRENGTHS):
        with steer(chat, axis, strength=strength):
            alone = logits(chat, ROWS[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-3)
        assert torch.equal(together[row], plain[row]) == (strength == 0)


def test_each_row_has_its_own_floor(chat: ChatModel, axis: Axis) -> None:
    middle = floors_between(chat, axis, (1, 3))
    floors = {layer: column(middle[layer], -1e4, middle[layer] + 5) for layer in middle}
    parts = tuple(interventions.cap(layer, axis.at(layer), floors[layer]) for layer in sorted(floors))
    plain = outputs(chat, ROWS)
    with cap(chat, Policy(parts)):
        together = outputs(chat, ROWS)
    for layer in floors:
        assert (axis.project(together[layer], layer) >= floors[layer] - SLACK).all()
    assert torch.equal(together[3][1], plain[3][1])
    for row in (0, 2):
        with cap(chat, Policy.cap(axis, {layer: float(floors[layer][row]) for layer in floors})):
            alone = outputs(chat, ROWS[row : row + 1])
        torch.testing.assert_close(together[3][row], alone[3][0], rtol=1e-4, atol=1e-3)


def test_several_directions_and_bounds_of_both_kinds(chat: ChatModel) -> None:
    """Bounds for all rows beside shifts for each."""
    directions = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    V = interventions.orthonormal(directions)
    lo, hi = torch.tensor([-1.0, -torch.inf]), torch.tensor([2.0, torch.inf])
    shift = torch.tensor([[0.0, 4.0], [0.5, 0.0], [-3.0, -5.0]])
    with held(chat, Policy((interventions.Intervention(1, V, lo, hi, shift),))):
        together = logits(chat, ROWS)
    for row in range(3):
        with held(chat, Policy((interventions.Intervention(1, V, lo, hi, shift[row]),))):
            alone = logits(chat, ROWS[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("positions", ["all", "decode"])
def test_rows_of_generate(chat: ChatModel, axis: Axis, positions: str) -> None:
    """Padded on the left, as batches of prompts are."""
    padded, mask = ROWS.clone(), torch.ones_like(ROWS)
    padded[1, :6], mask[1, :6] = 0, 0
    strengths = (30.0, 0.0, -30.0)

    def policy(strength: float | Tensor) -> Policy:
        return Policy((interventions.add(2, axis.at(2), strength),), positions=positions)  # type: ignore[arg-type]

    with held(chat, policy(column(*strengths))):
        together = generated(chat, padded, 6, attention_mask=mask)
    for row, strength in enumerate(strengths):
        with held(chat, policy(strength)):
            assert [together[row]] == generated(chat, padded[row : row + 1, 6 * (row == 1) :], 6)
    assert together != generated(chat, padded, 6, attention_mask=mask)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_batch_of_another_size_is_refused(chat: ChatModel, axis: Axis, n: int) -> None:
    rows = torch.arange(3, 3 + 5 * n).reshape(n, 5)
    with steer(chat, axis, strength=column(*STRENGTHS)):
        with pytest.raises(UsageError, match=f"Layer 2 has bounds for a batch of 3 sequences; {n} pass through"):
            logits(chat, rows)
        logits(chat, ROWS)
    logits(chat, rows)


def test_beams_of_a_sequence_are_refused(chat: ChatModel, axis: Axis) -> None:
    with steer(chat, axis, strength=column(*STRENGTHS)), pytest.raises(UsageError, match="6 pass through"):
        generated(chat, ROWS, 3, num_beams=2)


def test_one_reply_is_a_batch_of_one(tiny: Tiny, axis: Axis) -> None:
    chat = tiny("llama")
    with steer(chat, axis, strength=-30.0):
        said = chat.reply("What is rain?", max_tokens=6)
    with steer(chat, axis, strength=column(-30.0)):
        assert chat.reply("What is rain?", max_tokens=6) == said
    with steer(chat, axis, strength=column(1.0, 2.0)), pytest.raises(UsageError, match="batch of 2 sequences; 1 pass"):
        chat.reply("What is rain?", max_tokens=6)


@pytest.mark.parametrize("strengths", [(4.0,), (4.0, 8.0)])
def test_what_forms_its_own_batches_refuses_them(tiny: Tiny, axis: Axis, strengths: tuple[float, ...]) -> None:
    """Also when the number fits by chance."""
    chat = tiny("llama")
    requests = [Request(str(i), tuple(range(5, 9 + i))) for i in range(len(strengths))]
    passages = [Passage(r.key, r.prompt_ids, ((2, 4),)) for r in requests]
    ways: list[Callable[[], object]] = [
        lambda: list(DecodingLoop(chat, LAYERS, 1 << 10).generate(requests, Sampling(max_tokens=2))),
        lambda: list(read_passages(chat, passages)),
        lambda: list(score_passages(chat, passages)),
        lambda: residual_norms(chat, passages),
    ]
    with steer(chat, axis, strength=column(*strengths)):
        for way in ways:
            with pytest.raises(UsageError, match=r"Layer 2 has bounds for each sequence .* forms its own batches"):
                way()
    with steer(chat, axis, strength=column(1.0, 2.0)), pytest.raises(UsageError, match="1 pass through"):
        list(GenerateEngine(chat, LAYERS).generate(requests, Sampling(max_tokens=2)))
