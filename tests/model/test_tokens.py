"""Announcing what a forward consists of."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from persona_axis.errors import ModelError
from persona_axis.model.tokens import (
    GENERATED,
    GIVEN,
    OTHER,
    Announcement,
    announced,
    announcement,
    continuing,
    marked,
    of_forward,
    stretches,
)


class Decoder:
    """Takes what Transformers' decoders take."""

    def __init__(self, use_cache: bool = True) -> None:
        self.config = SimpleNamespace(use_cache=use_cache)

    def forward(
        self, input_ids: Any = None, mask: Any = None, past_key_values: Any = None, use_cache: Any = None, **kwargs: Any
    ) -> None: ...


def cache(tokens: int) -> Any:
    return SimpleNamespace(get_seq_length=lambda: tokens)


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.zeros(batch, tokens, dtype=torch.long)


class TestStretches:
    def test_spans_are_cut_to_the_row(self) -> None:
        marks = [marked([(0, 2), (4, 6)], GIVEN), marked([(1, 9)], GENERATED)]
        assert stretches([1, 7], [4, 3], marks).tolist() == [
            [GIVEN, OTHER, OTHER, GIVEN],
            [GENERATED, GENERATED, OTHER, OTHER],
        ]

    def test_padding_is_nothing(self) -> None:
        assert stretches([0, 0], [5, 2], [marked([(0, 5)], GIVEN), ()]).tolist() == [[GIVEN] * 5, [OTHER] * 5]

    def test_what_is_generated_wins(self) -> None:
        marks = marked([(0, 3)], GIVEN) + marked([(2, 4)], GENERATED)
        assert stretches([0], [5], [marks]).tolist() == [[GIVEN, GIVEN, GENERATED, GENERATED, OTHER]]

    def test_spans_before_and_behind_the_row(self) -> None:
        assert stretches([5], [2], [marked([(0, 5), (7, 9), (3, 3)], GIVEN)]).tolist() == [[OTHER, OTHER]]


class TestContinuing:
    @pytest.mark.parametrize(
        ("tokens", "start", "expected"),
        [
            (4, 0, [OTHER, GIVEN, GIVEN, OTHER]),  # the prompt
            (1, 4, [GENERATED]),
            (1, 3, [OTHER]),  # the prompt's last token by itself
            (6, 0, [OTHER, GIVEN, GIVEN, OTHER, GENERATED, GENERATED]),  # no cache: everything again
            (3, 2, [GIVEN, OTHER, GENERATED]),
        ],
    )
    def test_kinds(self, tokens: int, start: int, expected: list[int]) -> None:
        said = continuing(4, [(1, 3)])
        assert said.kinds(2, tokens, start).tolist() == [expected] * 2
        assert not said.rows_move

    def test_a_reply_that_was_begun(self) -> None:
        assert continuing(4, [(2, 4)]).kinds(1, 1, 3).tolist() == [[GIVEN]]


class TestAnnounced:
    def test_nested_and_left_by_an_exception(self) -> None:
        outer, inner = continuing(1), continuing(2)
        assert announcement() is None

        def fail_inside() -> None:
            with announced(inner):
                assert announcement() is inner
                raise KeyError

        with announced(outer):
            with pytest.raises(KeyError):
                fail_inside()
            assert announcement() is outer
        assert announcement() is None

    def test_another_thread_hears_nothing(self) -> None:
        heard = []
        with announced(continuing(1)):
            thread = threading.Thread(target=lambda: heard.append(announcement()))
            thread.start()
            thread.join()
        assert heard == [None]


class TestOfForward:
    def test_announced_forwards_are_what_was_said(self) -> None:
        asked = []

        def kinds(*shape: int) -> torch.Tensor:
            asked.append(shape)
            return torch.tensor([[OTHER, GIVEN, GENERATED]])

        with announced(Announcement(kinds)):
            for given in ({"input_ids": ids(1, 3)}, {"inputs_embeds": torch.zeros(1, 3, 8), "use_cache": False}):
                assert of_forward(Decoder(), (), given, replies=True).tolist() == [[False, True, True]]
                assert of_forward(Decoder(), (), given, replies=False).tolist() == [[False, False, True]]
            of_forward(Decoder(), (ids(1, 3), None, cache(7)), {}, replies=True)
        assert asked == [(1, 3, 0)] * 4 + [(1, 3, 7)]

    @pytest.mark.parametrize(
        ("args", "kwargs", "expected"),
        [
            ((), {"input_ids": ids(2, 3)}, [[False] * 3] * 2),
            ((ids(2, 3),), {"past_key_values": cache(0)}, [[False] * 3] * 2),
            ((ids(2, 1),), {"past_key_values": cache(0)}, [[False]] * 2),
            ((ids(2, 1),), {"past_key_values": cache(9)}, [[True]] * 2),
            ((ids(2, 1), None, cache(9)), {}, [[True]] * 2),
            ((), {"inputs_embeds": torch.zeros(2, 1, 8), "past_key_values": cache(9)}, [[True]] * 2),
            ((None,), {"inputs_embeds": torch.zeros(2, 1, 8), "past_key_values": cache(torch.tensor(9))}, [[True]] * 2),
            ((ids(2, 1), None, cache(9), False), {}, [[True]] * 2),
        ],
    )
    def test_a_cache_that_tells(self, args: Any, kwargs: Any, expected: Any) -> None:
        assert of_forward(Decoder(), args, kwargs, replies=False).tolist() == expected

    @pytest.mark.parametrize(
        ("decoder", "args", "kwargs", "message"),
        [
            (Decoder(), (ids(1, 2), None, cache(9)), {}, "2 tokens at once after a filled cache"),
            (Decoder(), (ids(1, 2),), {"use_cache": False}, "without a cache"),
            (Decoder(), (ids(1, 1), None, None, False), {}, "without a cache"),
            (Decoder(use_cache=False), (ids(1, 2),), {}, "without a cache"),
            (SimpleNamespace(forward=lambda input_ids, **kwargs: None), (ids(1, 2),), {}, "takes no past_key_values"),
        ],
    )
    def test_one_that_does_not(self, decoder: Any, args: Any, kwargs: Any, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            of_forward(decoder, args, kwargs, replies=False)

    def test_replies_are_never_guessed(self) -> None:
        for given in ({}, {"past_key_values": cache(9)}):
            with pytest.raises(ModelError, match="nobody said which tokens"):
                of_forward(Decoder(), (ids(1, 1),), given, replies=True)
