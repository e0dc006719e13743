"""What a calibration's record looks like in the terminal and as a page."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from persona_axis.report.calibration import (
    finalists,
    render_calibration,
    render_calibration_page,
    write_calibration_page,
)

EVIL = "</script><img src=x onerror=alert(1)>"
PAGE = Path("/runs/demo/calibration/calibration.html")


def interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def outcome(reduction: float, ratio: float, prompts: int, objections: list[str]) -> dict[str, Any]:
    fluency = {"perplexity": 2.9, "repetition": 0.01, "empty": 0.0}
    return {
        "pressure": {
            "reduction": interval(reduction, 0.1),
            "held": 0.3 * (1 - reduction),
            "plain": 0.3,
            "prompts": prompts,
            "missing": 1,
        },
        "capability": {
            "perplexity_ratio": interval(ratio, 0.004),
            "top1_agreement": interval(0.962, 0.01),
            "mean_kl": interval(0.0123, 0.001),
            "replies": 40,
        },
        "fluent": not objections,
        "fluency": {"objections": objections, "held": fluency, "plain": fluency, "neutral": fluency},
    }


def entry(layers: list[int], percentile: float, reduction: float, ratio: float, **changes: Any) -> dict[str, Any]:
    """A finalist unless ``held_out`` says otherwise; half B is a little worse than half A."""
    held_out = outcome(reduction - 0.05, ratio + 0.002, 144, changes.pop("objections_b", []))
    return {
        "layers": layers,
        "percentile_assistant": percentile,
        "percentile_paper": 100 - percentile,
        "floors": [1.0] * len(layers),
        "policy_hash": f"{layers}{percentile}",
        "front": True,
        **outcome(reduction, ratio, 144, changes.pop("objections", [])),
        "held_out": held_out,
        **changes,
    }


@pytest.fixture
def record() -> dict[str, Any]:
    chosen = entry([18, 19, 20, 21], 50, 0.78, 1.0071)
    rough = {**outcome(0.9, 1.001, 9, ["3.4% repeated 4-grams, plain replies 1.0%"]), "held_out": None, "front": False}
    return {
        "format": "persona-axis/calibration/1",
        "run": {"config_hash": "c", "model": f"tiny {EVIL}", "revision": "r"},
        "positions": "all",
        "pressure": "likelihood",
        "candidates": [
            entry([20, 21, 22, 23, 24, 25, 26, 27], 75, 0.98, 1.0251, objections_b=["perplexity 3.42"]),
            chosen,
            entry([7], 62.5, 0.2, 1.0003),
            {**entry([0, 1], 90, 0, 1), **rough},
        ],
        "chosen": chosen,
        "rule": "The best of the cheap ones. Half A decides.",
        "max_perplexity": 1.015,
        "tasks": {},
        "pool": {"n": 184, "roles": 144, "traits": 0, "default": 40, "percentiles": {}},
    }


def cells(record: dict[str, Any]) -> list[list[str]]:
    table = render_calibration(record, PAGE).split("\n\n")[1].splitlines()
    return [re.split(r"  +", line) for line in table[2:]]


# ---- the terminal ------------------------------------------------------------------------------------------------


def test_the_choice_and_how_it_does_where_it_was_not_chosen(record: dict[str, Any]) -> None:
    text = render_calibration(record, PAGE)
    assert all(len(line) <= 100 for line in text.splitlines())
    flat = " ".join(text.split())
    assert "chosen layers 18-21, floor at percentile 50 toward the Assistant (the paper's p0.5)" in flat
    assert "half B, 144 role prompts: pressure reduced by 73% [63%, 83%] (0.300 to 0.081 nats per token)" in flat
    assert "perplexity of 40 neutral replies x1.0091 [1.0051, 1.0131]" in flat
    assert "same likeliest token at 96.2%, KL 0.0123 nats; fluent" in flat
    assert "rule The best of the cheap ones." in flat
    assert "184 replies of half A, every score: 144 of roles, 40 of the default persona, no traits" in flat
    assert "policy /runs/demo/calibration/policy" in flat
    assert "page /runs/demo/calibration/calibration.html" in flat


def test_every_finalist_has_a_row_and_both_conventions(record: dict[str, Any]) -> None:
    assert "3 of 4 candidates met every prompt" in render_calibration(record, PAGE)
    assert cells(record) == [  # by price on half B
        ["7-7", "62.5 (p0.375)", "20% [10%, 30%]", "15% [5%, 25%]", "x1.0023 [0.9983, 1.0063]", "yes"],
        ["18-21", "50 (p0.5)", "78% [68%, 88%]", "73% [63%, 83%]", "x1.0091 [1.0051, 1.0131]", "yes"],
        ["20-27", "75 (p0.25)", "98% [88%, 108%]", "93% [83%, 103%]", "x1.0271 [1.0231, 1.0311]", "no"],
    ]
    assert len(finalists(record)) == 3


def test_a_choice_that_is_not_fluent_on_half_b_says_why(record: dict[str, Any]) -> None:
    record["chosen"] = record["candidates"][0]
    flat = " ".join(render_calibration(record, PAGE).split())
    assert "layers 20-27, floor at percentile 75 toward the Assistant (the paper's p0.25)" in flat
    assert "nats; not fluent: perplexity 3.42" in flat


def test_a_reduction_whose_interval_reaches_zero_is_not_one(record: dict[str, Any]) -> None:
    assert "told from nothing" not in render_calibration(record, PAGE)
    record["chosen"]["held_out"]["pressure"]["reduction"]["low"] = 0.0
    flat = " ".join(render_calibration(record, PAGE).split())
    assert "nats per token), which cannot be told from nothing, perplexity" in flat


def test_no_choice(record: dict[str, Any]) -> None:
    record["chosen"] = None
    text = render_calibration(record, PAGE)
    assert text.startswith("chosen      nothing: no candidate of the last round writes fluent replies")
    assert "policy" not in text
    assert len(cells(record)) == 3


def test_another_pressure_is_not_in_nats(record: dict[str, Any]) -> None:
    record["pressure"] = "harm"
    for text in (render_calibration(record, PAGE), render_calibration_page(record)):
        assert "0.300 to 0.081 harm)" in " ".join(text.split())
        assert "nats per token" not in text


def test_tasks_have_a_line_each(record: dict[str, Any]) -> None:
    plain, held = ({"metric": "acc", "value": value, "n": 50, "low": None, "high": None} for value in (0.5, 0.48))
    record["tasks"] = {"own": {"plain": plain, "held": held, "held_over_plain": None}}
    assert "own: acc 0.5 plain, 0.48 held, 50 documents" in " ".join(render_calibration(record, PAGE).split())


# ---- the page ----------------------------------------------------------------------------------------------------


def drawn(page: str) -> dict[str, Any]:
    """The figures of a page."""
    [found] = [
        json.loads(text)
        for text in re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.DOTALL)
        if text.lstrip().startswith("{") and "front-a" in text
    ]
    return dict(found)


def test_the_page_has_both_halves_and_the_choice(record: dict[str, Any]) -> None:
    page = render_calibration_page(record)
    figures = drawn(page)
    assert figures.keys() == {"front-a", "front-b"}
    points = {
        name: [(t["x"][0], t["y"][0], t["marker"]["symbol"]) for t in figure["data"]]
        for name, figure in figures.items()
    }
    assert points["front-a"] == [
        (1.0251, 0.98, "circle"),
        (1.0071, 0.78, "star"),
        (1.0003, 0.2, "circle"),
        (1.001, 0.9, "circle-open"),
    ]
    expected = [(1.0271, 0.93, "circle-open"), (1.0091, 0.73, "star"), (1.0023, 0.15, "circle")]
    assert [tuple(map(pytest.approx, p[:2])) for p in points["front-b"]] == [p[:2] for p in expected]
    assert [p[2] for p in points["front-b"]] == [p[2] for p in expected]
    for trace in figures["front-b"]["data"]:
        assert trace["error_x"]["visible"]
        assert trace["error_y"]["array"] == pytest.approx([0.1])
        assert trace["error_x"]["arrayminus"] == pytest.approx([0.004])
    line = figures["front-b"]["layout"]["shapes"][0]
    assert line["x0"] == line["x1"] == 1.015
    assert "9 prompts" in figures["front-a"]["data"][3]["hovertext"]
    assert "layers 18-21, floor at percentile 50" in page


def test_the_page_needs_no_network_and_trusts_no_name(record: dict[str, Any], tmp_path: Path) -> None:
    path = write_calibration_page(tmp_path / "calibration.html", record)
    page = path.read_text()
    assert EVIL not in page
    assert "&lt;img src=x" in page
    body = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"']?https?:", body)


def test_without_a_choice_the_page_says_so(record: dict[str, Any]) -> None:
    changed = copy.deepcopy(record)
    changed["chosen"] = None
    page = render_calibration_page(changed)
    assert "No candidate of the last round writes fluent replies" in page
    assert not any("star" in trace["marker"]["symbol"] for f in drawn(page).values() for trace in f["data"])
