"""The model that an axis was made on is found, or its name is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from persona_axis.collect import origin
from persona_axis.collect.origin import differences, load_origin
from persona_axis.errors import UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.identity import ModelIdentity

COMMIT = "0123456789" * 4
RUN = {"model": "./mine", "revision": None, "chat_template": "{{ messages }}", "dtype": "auto", "seed": 0}


def made_on(**metadata: Any) -> Axis:
    return Axis(torch.ones(1, 8), (0,), 0, metadata)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(origin, "load_model", lambda **options: calls.append(options))
    return calls


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"model": "HuggingFaceTB/SmolLM2-135M-Instruct (embedded Q4_1)"}, {"model": "embedded"}),
        ({"model": "a/b-1.5", "revision": COMMIT}, {"model": "a/b-1.5", "revision": COMMIT}),
        ({"model": "a/b", "revision": "local-0123"}, {"model": "a/b", "revision": None}),
    ],
)
def test_what_an_axis_records(
    loaded: list[dict[str, Any]], tmp_path: Path, metadata: dict[str, str], expected: dict[str, Any]
) -> None:
    load_origin(tmp_path, made_on(**metadata), dtype="float32")
    assert loaded == [{**expected, "dtype": "float32", "device": "auto"}]


def test_a_run_says_how_and_the_user_has_the_last_word(loaded: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"generation": RUN}))
    load_origin(tmp_path, made_on(model="mine"))
    load_origin(tmp_path, made_on(model="mine"), "other")
    where = {"dtype": "auto", "device": "auto"}
    assert loaded == [
        {"model": "./mine", "revision": None, "chat_template": "{{ messages }}", **where},
        {"model": "other", **where},
    ]


@pytest.mark.parametrize(("metadata", "words"), [({"model": "mine"}, "was called 'mine'"), ({}, "does not say its")])
def test_what_cannot_be_told_is_asked(tmp_path: Path, metadata: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=rf"{words}.* Name the model: --model"):
        load_origin(tmp_path, made_on(**metadata))


@pytest.mark.parametrize(
    ("metadata", "differs"),
    [
        ({}, False),
        ({"model": "a/b", "revision": "1"}, False),
        ({"model": "a moved folder", "revision": "1"}, False),
        ({"model": "a/b", "revision": "2"}, True),
        ({"model": "a/c"}, True),
    ],
)
def test_another_model_is_noticed(monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str], differs: bool) -> None:
    monkeypatch.setattr(ModelIdentity, "of", lambda chat: ModelIdentity("a/b", "1", d_model=8))
    assert bool(differences(made_on(**metadata), SimpleNamespace())) == differs  # type: ignore[arg-type]
