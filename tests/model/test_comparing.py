"""A model beside another state of itself, against whole forwards and float64 softmaxes of the whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from plain_reference import block_outputs
from torch import Tensor

from persona_axis.model import comparing
from persona_axis.model.comparing import Compared, compare_states
from persona_axis.model.head import Head
from persona_axis.model.loading import ChatModel
from persona_axis.model.reading import Passage, predicting_states, score_passages

TOKENS = [(7 * i * i + 3 * i + 5) % 250 for i in range(60)]


def passages() -> list[Passage]:
    """In no order of length; two spans in one; two with a prefix in common."""
    return [
        Passage("long", tuple(TOKENS[:40]), ((30, 40),), shared=29),
        Passage("two", tuple(TOKENS[5:30]), ((3, 6), (20, 25))),
        Passage("again", tuple(TOKENS[:29] + TOKENS[50:58]), ((30, 37),), shared=29),
        Passage("one", tuple(TOKENS[9:14]), ((4, 5),), shared=3),
    ]


def naive(p_logits: Tensor, q_logits: Tensor, targets: list[int]) -> dict[str, np.ndarray]:
    """Token by token in float64."""
    found: dict[str, list[float]] = {"plain": [], "other": [], "agree": [], "kl": []}
    for p_row, q_row, target in zip(p_logits.double().tolist(), q_logits.double().tolist(), targets, strict=True):
        p, q = ([x - math.log(sum(map(math.exp, row))) for x in row] for row in (p_row, q_row))
        found["plain"].append(p[target])
        found["other"].append(q[target])
        found["agree"].append(float(p.index(max(p)) == q.index(max(q))))
        found["kl"].append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    return {name: np.array(values) for name, values in found.items()}


def assert_equal(found: Compared, expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        mine = getattr(found, name)
        assert mine.dtype == torch.float32
        np.testing.assert_allclose(mine.numpy(), values, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "falcon"])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_compared_is_the_whole_softmax_in_float64(
    tiny: Any, arch: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is held at once; gemma2's logits are capped."""
    chat = tiny(arch)
    head = Head(chat.model)
    monkeypatch.setattr(comparing, "LOGITS", rows * head.vocabulary)
    random = torch.Generator().manual_seed(0)
    plain = torch.randn(11, chat.d_model, generator=random)
    other = plain + 0.4 * torch.randn(11, chat.d_model, generator=random)
    targets = torch.randint(head.vocabulary, (11,), generator=random)
    with torch.inference_mode():
        p, q = (head.logits(states).clone() for states in (plain, other))
    expected = naive(p, q, targets.tolist())
    assert 0 < expected["agree"].sum() < 11
    found = compare_states(head, plain, other, targets)
    assert_equal(found, expected)
    # Divergence is not the same the other way round.
    assert not np.allclose(found.kl.numpy(), compare_states(head, other, plain, targets).kl.numpy(), rtol=0.05)


def test_a_state_beside_itself(tiny: Any) -> None:
    chat = tiny()
    states = torch.randn(5, chat.d_model, generator=torch.Generator().manual_seed(1))
    found = compare_states(Head(chat.model), states, states.clone(), torch.arange(5))
    assert torch.equal(found.plain, found.other)
    assert found.agree.tolist() == [1.0] * 5
    assert found.kl.tolist() == [0.0] * 5


def whole_forward(chat: ChatModel, passage: Passage) -> tuple[Tensor, list[int]]:
    """Logits that predict the spans' tokens, and those tokens."""
    _, logits = block_outputs(chat, passage.token_ids)
    places = [i for a, b in passage.spans for i in range(a, b)]
    return logits[[i - 1 for i in places]], [passage.token_ids[i] for i in places]


@pytest.mark.parametrize("proven", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_predicting_states_predict_the_spans(tiny: Any, arch: str, proven: bool) -> None:
    """What the head makes of them is what a whole forward says; prefixes computed once where the loop is proven."""
    chat = replace(tiny(arch), loop_proven=proven)
    head = Head(chat.model)
    for batch_tokens in (8192, 40):
        found = dict(predicting_states(chat, passages(), batch_tokens))
        assert found.keys() == {p.key for p in passages()}
        for p in passages():
            expected, targets = whole_forward(chat, p)
            assert found[p.key].shape == (len(targets), chat.d_model)
            with torch.inference_mode():
                logits = head.logits(found[p.key]).clone()
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_comparing_says_the_log_probabilities_that_scoring_says(tiny: Any) -> None:
    chat = tiny()
    scored = dict(score_passages(chat, passages()))
    for key, states in predicting_states(chat, passages()):
        [p] = [p for p in passages() if p.key == key]
        targets = torch.tensor([p.token_ids[i] for a, b in p.spans for i in range(a, b)])
        found = compare_states(Head(chat.model), states, states, targets)
        np.testing.assert_allclose(found.plain.numpy(), np.concatenate(scored[key]), rtol=1e-5, atol=1e-5)


def test_a_span_without_a_token_before_it_is_refused(tiny: Any) -> None:
    chat = tiny()
    for passage in (
        Passage("first", tuple(TOKENS[:9]), ((0, 3),)),
        Passage("x", tuple(TOKENS[:9]), ((3, 5),), shared=3),
    ):
        with pytest.raises(ValueError, match="needs a token of the passage's own before it"):
            list(predicting_states(chat, [passage]))
