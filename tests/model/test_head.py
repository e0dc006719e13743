"""The head against `model(...)` and a plain log-softmax."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from persona_axis.model import head as head_module
from persona_axis.model.head import Head
from persona_axis.model.layers import text_decoder
from tests.conftest import LOOP_ARCHS

VOCABULARY, WIDTH, ROWS = 2 * head_module.SCORE_SLICE + 37, 16, 40


def model_of(head: nn.Module, **config: Any) -> Any:
    """As much of a model as :class:`Head` looks at."""
    text = SimpleNamespace(**config)
    return SimpleNamespace(
        get_output_embeddings=lambda: head, config=SimpleNamespace(get_text_config=lambda decoder: text)
    )


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)


@pytest.fixture
def hidden() -> Tensor:
    return 3 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets() -> Tensor:
    edges = [0, head_module.SCORE_SLICE - 1, head_module.SCORE_SLICE, VOCABULARY - 1]  # of the slices
    rest = torch.randint(VOCABULARY, (ROWS - len(edges),), generator=torch.Generator().manual_seed(2))
    return torch.cat([torch.tensor(edges), rest])


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0].float()


@pytest.mark.parametrize("arch", LOOP_ARCHS)
@torch.inference_mode()
def test_logits_are_the_models(tiny: Any, arch: str) -> None:
    model = tiny(arch).model
    ids = torch.randint(3, 270, (5, 7), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits[:, -1]
    hidden = text_decoder(model)(input_ids=ids).last_hidden_state[:, -1]
    torch.testing.assert_close(Head(model).logits(hidden), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize(
    "config", [{}, {"final_logit_softcapping": 4.0}, {"logit_scale": 0.3}, {"logits_scaling": 1.7}], ids=str
)
def test_logprobs(
    linear: nn.Linear, hidden: Tensor, targets: Tensor, bias: bool, hooked: bool, config: dict[str, float]
) -> None:
    if not bias:
        linear.bias = None
    if hooked:  # an adapter, say: what the hook does must not be lost
        linear.register_forward_hook(lambda module, args, output: output + 0.5 * output.sin())
    logits = linear(hidden)
    if "logit_scale" in config:
        logits = logits * config["logit_scale"]
    if "logits_scaling" in config:
        logits = logits / config["logits_scaling"]
    if "final_logit_softcapping" in config:
        logits = 4.0 * torch.tanh(logits / 4.0)
    head = Head(model_of(linear, **config))
    torch.testing.assert_close(head.logits(hidden), logits)
    torch.testing.assert_close(head.logprobs(hidden, targets), plain(logits, targets), rtol=1e-5, atol=1e-5)


def test_rows_are_scored_in_parts(
    linear: nn.Linear, hidden: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "SCORE_ROWS", 7)
    scored = Head(model_of(linear)).logprobs(hidden, targets)
    torch.testing.assert_close(scored, plain(linear(hidden), targets), rtol=1e-5, atol=1e-5)


def test_a_slice_that_can_never_be_chosen(linear: nn.Linear, hidden: Tensor, targets: Tensor) -> None:
    linear.bias[head_module.SCORE_SLICE : 2 * head_module.SCORE_SLICE] = -torch.inf
    scored = Head(model_of(linear)).logprobs(hidden, targets)
    torch.testing.assert_close(scored, plain(linear(hidden), targets), rtol=1e-5, atol=1e-5)


def test_nan_is_not_hidden(linear: nn.Linear, hidden: Tensor, targets: Tensor) -> None:
    hidden[3, 0] = torch.nan
    scored = Head(model_of(linear)).logprobs(hidden, targets)
    assert scored.isnan().nonzero()[:, 0].tolist() == [3]


def test_bfloat16_is_scored_from_the_heads_own_logits(linear: nn.Linear, hidden: Tensor, targets: Tensor) -> None:
    linear, hidden = linear.bfloat16(), hidden.bfloat16()
    scored = Head(model_of(linear)).logprobs(hidden, targets)
    torch.testing.assert_close(scored, plain(linear(hidden), targets), rtol=0, atol=0.1)


def test_logits_of_fewer_rows_after_more(linear: nn.Linear, hidden: Tensor) -> None:
    head = Head(model_of(linear))
    for n in (ROWS, 3, 1, ROWS):
        torch.testing.assert_close(head.logits(hidden[:n]), linear(hidden[:n]))
