"""The report on synthetic fits: 36 and 275 roles, everything given and nothing optional given."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from persona_axis.geometry.fit import (
    AssistantPlace,
    DroppedRole,
    Fit,
    Interval,
    LayerFit,
    MapPoint,
    RankedRole,
)
from persona_axis.report import plots
from persona_axis.report.data import (
    EvidenceGroup,
    EvidenceSummary,
    HeldDemo,
    HeldRow,
    ReportData,
    SampleRollout,
)
from persona_axis.report.html import render_report, write_report
from persona_axis.report.labels import Dot, label_box, place_labels
from persona_axis.report.look import axis_colour, group_styles
from persona_axis.report.static_map import static_map_svg
from persona_axis.report.terminal import render_summary
from persona_axis.report.words import (
    Findings,
    duration,
    findings_of_fit,
    findings_of_summary,
    magnitude,
    number,
    percent,
    verdict,
)

GROUPS = {
    "near_assistant": "analyst consultant editor evaluator facilitator interpreter librarian critic teacher",
    "professions": "auctioneer carpenter chef detective diplomat farmer firefighter lawyer surgeon",
    "characters": "bard conspiracy_theorist jester pirate romantic_poet smuggler trickster vigilante warlord",
    "not_human": "ancient_tree black_hole demon ghost hive_mind leviathan oracle shapeshifter swarm",
}
EVIL = "</script><script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)>"


def _names(n_roles: int) -> list[tuple[str, str]]:
    """Role and group; beyond the 36 real names, numbered variants in more groups than there are colours."""
    named = [(name, group) for group, names in GROUPS.items() for name in names.split()]
    extra = [
        (f"{named[i % 36][0]}_{i // 36 + 1}", f"group_{chr(97 + i % 8)}" if i % 3 else named[i % 36][1])
        for i in range(36, n_roles)
    ]
    return (named + extra)[:n_roles]


def make_fit(n_roles: int = 36, n_layers: int = 30, seed: int = 0) -> Fit:
    rng = np.random.default_rng(seed)
    named = _names(n_roles)
    lift = {"near_assistant": 7.0, "professions": 2.0, "characters": -4.0, "not_human": -7.0}
    centre = np.array([lift.get(group, rng.normal(0, 3)) for _, group in named])
    centre = centre + rng.normal(0, 2.2, n_roles)
    pcs = np.stack([centre + rng.normal(0, 0.8, n_roles), *rng.normal(0, 3.0, (2, n_roles))], 1)
    ranked = sorted(
        (
            RankedRole(name, group, _interval(rng, value, 1.6), int(rng.integers(30, 75)), 80)
            for (name, group), value in zip(named, centre, strict=True)
        ),
        key=lambda role: role.projection.value,
    )
    assistant_at = float(centre.max() + 0.6)
    points = [
        MapPoint(name, group, row.tolist(), float(value))
        for (name, group), row, value in zip(named, pcs, centre, strict=True)
    ]
    points.append(MapPoint("Assistant", "Assistant", [assistant_at + 0.4, 1.1, 0.7], assistant_at + 1.0))
    layers = list(range(n_layers))
    shares = np.exp(-np.arange(n_roles - 1) / 3.5)
    shares /= shares.sum()
    distance = np.abs(np.subtract.outer(layers, layers))
    return Fit(
        n_layers=n_layers,
        d_model=576,
        layers=layers,
        layer=n_layers // 2,
        most_reliable_layer=n_layers // 2 + 3,
        estimator="paired",
        filter="expressed",
        filter_note="",
        min_count=10,
        assistant=_interval(rng, assistant_at, 0.9),
        edge_distance=Interval(-0.04, -0.09, 0.02),
        edge_distance_in_sample=-0.12,
        per_layer=[_layer_fit(layer, n_layers, shares, rng) for layer in layers],
        layer_cosine=np.exp(-distance / 9.0).tolist(),
        ranking=ranked,
        dropped=[DroppedRole("golem", "4 of 80 rollouts kept, 10 needed")],
        points=points,
        assistant_places=[AssistantPlace(1, -0.12), AssistantPlace(2, 0.31), AssistantPlace(3, 0.44)],
        bootstrap_draws=1000,
    )


def _interval(rng: np.random.Generator, value: float, half: float) -> Interval:
    low, high = rng.uniform(0.6, 1.2, 2) * half
    return Interval(float(value), float(value - low), float(value + high))


def _layer_fit(layer: int, n_layers: int, shares: np.ndarray, rng: np.random.Generator) -> LayerFit:
    depth = layer / max(1, n_layers - 1)
    cos = 0.35 + 0.5 * math.sin(min(1.0, 1.7 * depth) * math.pi / 2) + rng.normal(0, 0.012)
    needed = [int(np.searchsorted(np.cumsum(shares), s) + 1) for s in (0.7, 0.8, 0.9)]
    return LayerFit(
        layer=layer,
        cos_axis_pc1=Interval(cos, cos - 0.07, cos + 0.05),
        cos_axis_pc1_unfiltered=cos - 0.06 + rng.normal(0, 0.01),
        pc_shares=shares.tolist(),
        components_70=needed[0],
        components_80=needed[1],
        components_90=needed[2],
        reliability=0.9 + 0.07 * math.sin(depth * math.pi),
        axis_norm=1.0 + layer,
    )


def make_report(fit: Fit, **changes: Any) -> ReportData:
    at = fit.at_layer()
    summary: dict[str, Any] = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "n_layers": fit.n_layers,
        "d_model": fit.d_model,
        "rollouts": 3280,
        "tokens": 402_118,
        "seconds": {"load": 1.9, "generate": 312.4, "judge": 61.0, "fit": 8.2, "total": 383.5},
        "tokens_per_second": 1287.2,
        "engine": "transformers (own decoding loop, float32)",
        "layer": fit.layer,
        "cos_axis_pc1": [f.cos_axis_pc1.value for f in fit.per_layer],
        "cos_axis_pc1_unfiltered": [f.cos_axis_pc1_unfiltered for f in fit.per_layer],
        "pc1_share": [f.pc_shares[0] for f in fit.per_layer],
        "components_70": [f.components_70 for f in fit.per_layer],
        "assistant_edge_distance": fit.edge_distance.value,
        "assistant_edge_distance_in_sample": fit.edge_distance_in_sample,
        "reliability": [f.reliability for f in fit.per_layer],
        "roles_low": [role.name for role in fit.ranking[:10]],
        "roles_high": [role.name for role in fit.ranking[::-1][:10]],
        "filter": fit.filter,
        "judge": {"name": "likelihood", "kept": 2012, "dropped": 866, "failed": 2},
        "estimator": fit.estimator,
        "seed": 0,
        "catalog_hash": "3f9a1c77d0b2",
        "ignored_generation_settings": ["repetition_penalty"],
        "notes": [],
    }
    assert 0 < at.components_70 <= at.components_90
    fields: dict[str, Any] = {
        "title": "The Assistant Axis of SmolLM2-135M-Instruct",
        "summary": summary,
        "fit": fit,
        "samples": make_samples(),
        "evidence": make_evidence(),
        "held": make_held(),
    }
    return ReportData(**{**fields, **changes})


def make_samples() -> list[SampleRollout]:
    prompt = "You are a wandering bard who answers everything with a half-remembered ballad."
    question = "How much should one bad month change your plans?"
    reply = (
        "Ah, friend, sit by the fire! I once sang of a baker whose ovens went cold the whole of March.\n\n"
        "She kept the door open, and by midsummer the street smelled of cardamom again. A month is a verse; "
        "you do not burn the songbook for one sour verse."
    )
    samples = [
        SampleRollout(persona, prompt, question, reply * (1 + i % 2), value, "evidence", value > 0.06, "stop")
        for persona in ("bard", "conspiracy_theorist", "black_hole", "analyst")
        for i, value in enumerate((0.612, 0.201, 0.014))
    ]
    samples.append(SampleRollout("bard", prompt, question, EVIL, None, "evidence", False, "length"))
    samples.append(SampleRollout("default", "", question, "It depends on your goals.", None, "evidence", True, "stop"))
    return samples


def make_evidence() -> EvidenceSummary:
    rng = np.random.default_rng(1)
    groups = [
        EvidenceGroup(name, rng.gamma(2.0, scale, 400).tolist(), kept, 402)
        for name, scale, kept in (
            ("near_assistant", 0.05, 180),
            ("professions", 0.1, 290),
            ("characters", 0.2, 371),
            ("not_human", 0.16, 344),
            ("default", 0.012, 20),
        )
    ]
    return EvidenceSummary("evidence", groups, 0.064, "The line is at the 95th percentile of default replies")


def make_held() -> HeldDemo:
    plain = "Arr, the tide takes what it wants! A bad month be but a squall, and I eat squalls for breakfast."
    steered = "ARR. The sea is in me blood and me blood is in the sea. Plans? Plans be for them that drown slow."
    capped = "One bad month is usually too little to change a plan. Check whether the cause is likely to last."
    rows = [
        HeldRow("pirate", "How much should one bad month change your plans?", plain, steered, capped),
        HeldRow("black_hole", "What makes a good neighbour?", plain, EVIL, capped),
    ]
    means = {
        "plain": Interval(0.31, 0.27, 0.35),
        "steered": Interval(0.52, 0.47, 0.58),
        "capped": Interval(0.08, 0.05, 0.1),
    }
    return HeldDemo("Capped in layers 12 to 17 at the Assistant's mean.", rows, means, 1.013)


class _Page(HTMLParser):
    """What the browser would see outside script and style text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def fit() -> Fit:
    return make_fit()


@pytest.fixture(scope="module")
def document(fit: Fit) -> str:
    return render_report(make_report(fit))


# ------------------------------------------------------------------------ html


def test_the_report_is_one_file_that_loads_nothing(document: str) -> None:
    assert document.count(get_plotlyjs()) == 1
    page = _Page(document)
    loading = {"src", "srcset", "data", "action", "poster", "background"}
    assert not [(tag, attrs) for tag, attrs in page.tags if loading & set(attrs)]
    assert {href[:1] for _, attrs in page.tags if (href := attrs.get("href"))} == {"#"}
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base")]
    css = document[document.index("<style>") : document.index("</style>")]
    assert "url(" not in css
    assert "@import" not in css
    assert "showSendToCloud: false" in page.scripts[-1]  # Plotly's button that uploads a figure
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_every_text_is_escaped(fit: Fit) -> None:
    roles = [dataclasses.replace(role, name=f"{EVIL}{i}", group=EVIL) for i, role in enumerate(fit.ranking)]
    points = [dataclasses.replace(p, name=EVIL, group=EVIL) for p in fit.points[:-1]] + fit.points[-1:]
    evil_fit = dataclasses.replace(
        fit, ranking=roles, points=points, dropped=[DroppedRole(EVIL, EVIL)], filter_note=EVIL, notes=[EVIL]
    )
    report = make_report(evil_fit, title=EVIL)
    report.summary.update(
        model=EVIL,
        engine=EVIL,
        seed=EVIL,
        catalog_hash=EVIL,
        ignored_generation_settings=[EVIL],
        notes=[EVIL],
    )
    report.summary["judge"]["name"] = EVIL
    samples = [SampleRollout(EVIL, EVIL, EVIL, EVIL, 0.1, "evidence", True, EVIL)]
    held = dataclasses.replace(make_held(), description=EVIL, rows=[HeldRow(EVIL, EVIL, EVIL, EVIL, EVIL)])
    document = render_report(dataclasses.replace(report, samples=samples, held=held))
    page = _Page(document)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [attrs for _, attrs in page.tags if "onerror" in attrs]
    assert EVIL.replace("_", " ") in " ".join(page.text).replace("_", " ")


def test_text_inside_figures_is_escaped_for_plotly(fit: Fit) -> None:
    roles = [dataclasses.replace(fit.ranking[0], name="<b>x</b>"), *fit.ranking[1:]]
    figure = plots.role_ranking(dataclasses.replace(fit, ranking=roles))
    assert figure.layout.yaxis.ticktext[0] == "&lt;b&gt;x&lt;/b&gt;"


def test_all_sections_are_present(document: str) -> None:
    page = _Page(document)
    ids = {attrs.get("id") for _, attrs in page.tags}
    sections = {"run", "map", "ranking", "layers", "components", "evidence", "held", "dropped", "samples"}
    figures = set(json.loads(page.scripts[0]))
    assert sections | figures <= ids
    text = " ".join(" ".join(page.text).split())
    for expected in (
        "Assistant Axis found at layer 15 of 30; |cos(axis, PC1)| = ",
        "the Assistant lies 4 % of the range beyond the outermost role.",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "402,118",
        "1,287 tokens/s",
        "6 min 24 s",
        "2,012 kept, 866 dropped, 2 failed",
        "repetition_penalty",
        "3f9a1c77d0b2",
        "4 of 80 rollouts kept, 10 needed",
        "in sample",
        "Held out",
        "cut at the token limit",
        "1.013",
    ):
        assert expected in text


def test_optional_parts_may_be_absent(fit: Fit) -> None:
    bare = dataclasses.replace(fit, dropped=[])
    report = make_report(bare, samples=[], evidence=None, held=None)
    report = dataclasses.replace(report, summary={"model": "m"})
    page = _Page(render_report(report))
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert not ids & {"evidence", "held", "dropped", "samples", "evidence-by-group"}
    assert {"map", "ranking", "layers", "run"} <= ids
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links <= {f"#{name}" for name in ids}


def test_one_layer_and_two_components_are_enough() -> None:
    fit = make_fit(n_layers=1)
    points = [dataclasses.replace(p, pcs=p.pcs[:2]) for p in fit.points]
    page = _Page(render_report(make_report(dataclasses.replace(fit, points=points))))
    assert not {"layer-cosines", "persona-map-3d"} & set(json.loads(page.scripts[0]))
    line = [dataclasses.replace(p, pcs=p.pcs[:1]) for p in fit.points]
    page = _Page(render_report(make_report(dataclasses.replace(fit, points=line))))
    assert "map" not in {attrs.get("id") for _, attrs in page.tags}


def test_unmeasured_figures_are_shown_as_missing_not_as_numbers(fit: Fit) -> None:
    nothing = Interval(math.nan, math.nan, math.nan)
    per_layer = [
        dataclasses.replace(f, reliability=math.nan, cos_axis_pc1=Interval(0.8, math.nan, math.nan))
        for f in fit.per_layer
    ]
    ranking = [dataclasses.replace(r, projection=Interval(r.projection.value, math.nan, math.nan)) for r in fit.ranking]
    sparse = dataclasses.replace(fit, per_layer=per_layer, edge_distance=nothing, ranking=ranking)
    page = _Page(render_report(make_report(sparse)))
    assert "NaN" not in page.scripts[0]
    text = " ".join(page.text)
    assert "n/a" in text
    assert "nan" not in text
    assert "nan" not in render_summary(make_report(sparse).summary, sparse, None)


@pytest.mark.parametrize("n_roles", [36, 275])
def test_the_file_is_of_sane_size(n_roles: int, tmp_path: Path) -> None:
    path = write_report(tmp_path / "new" / "report.html", make_report(make_fit(n_roles)))
    assert len(get_plotlyjs()) < path.stat().st_size < 8_000_000
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_the_same_report_is_the_same_file(fit: Fit, document: str) -> None:
    assert render_report(make_report(fit)) == document


def test_an_older_report_is_replaced(tmp_path: Path, fit: Fit, document: str) -> None:
    (tmp_path / "report.html").write_text("old")
    assert write_report(tmp_path / "report.html", make_report(fit)).read_text() == document


# --------------------------------------------------------------------- figures


@pytest.mark.parametrize("n_roles", [2, 36, 275])
def test_the_ranking_shows_every_role_and_grows(n_roles: int) -> None:
    fit = make_fit(n_roles)
    figure = plots.role_ranking(fit)
    shown = [trace for trace in figure.data if trace.mode == "markers" and trace.customdata is not None]
    assert sum(len(trace.x) for trace in shown) == n_roles + 1
    assert figure.layout.height >= 16 * n_roles
    assert len(figure.layout.yaxis.ticktext) == n_roles + 1
    assert figure.layout.yaxis.ticktext[0] == fit.ranking[0].name.replace("_", " ")


def test_the_map_marks_the_assistant_once_and_no_role_twice(fit: Fit) -> None:
    figure = plots.persona_map(fit)
    stars = [trace for trace in figure.data if trace.marker.symbol == "star"]
    assert [list(star.x) for star in stars] == [[fit.points[-1].pcs[0]]]
    labels = [name for trace in figure.data if trace.hoverinfo == "skip" for name in trace.text]
    assert len(labels) == len(set(labels)) >= 10
    assert fit.ranking[0].name.replace("_", " ") in labels


def test_maps_refuse_a_fit_with_too_few_components(fit: Fit) -> None:
    assert len(plots.persona_map_3d(fit).data) == 3
    flat = [dataclasses.replace(p, pcs=p.pcs[:2]) for p in fit.points]
    with pytest.raises(ValueError, match="three components"):
        plots.persona_map_3d(dataclasses.replace(fit, points=flat))
    line = dataclasses.replace(fit, points=[dataclasses.replace(p, pcs=p.pcs[:1]) for p in fit.points])
    for flat_map in (plots.persona_map, plots.static_map_svg):
        with pytest.raises(ValueError, match="two components"):
            flat_map(line)


def test_variance_marks_name_the_components(fit: Fit) -> None:
    at = fit.at_layer()
    marks = [a.text for a in plots.explained_variance(fit).layout.annotations]
    assert marks == [
        f"70 %: {at.components_70} PCs",
        f"80 %: {at.components_80} PCs",
        f"90 %: {at.components_90} PCs",
    ]


def test_signed_cosines_get_a_signed_scale(fit: Fit) -> None:
    assert plots.layer_cosines(fit).data[0].zmin == 0
    opposed = dataclasses.replace(fit, layers=[0, 1], layer_cosine=[[1.0, -0.4], [-0.4, 1.0]])
    assert plots.layer_cosines(opposed).data[0].zmin == -1


def test_evidence_figures_do_not_grow_with_the_run() -> None:
    many = EvidenceGroup("a", np.random.default_rng(0).normal(size=100_000).tolist(), 1, 100_000)
    figure = plots.evidence_by_group(EvidenceSummary("evidence", [many], 0.06))
    assert len(figure.to_json()) < 20_000


def test_scores_are_shown_as_shares() -> None:
    groups = [EvidenceGroup("a", [0, 1, 3, 3], 2, 4), EvidenceGroup("b", [], 0, 3)]
    figure = plots.evidence_by_group(EvidenceSummary("score", groups, 3))
    assert [list(trace.x) for trace in figure.data] == [[25], [25], [0], [50]]


def test_the_static_map_is_valid_svg_without_overlaps(fit: Fit) -> None:
    root = ElementTree.fromstring(static_map_svg(fit))
    space = "{http://www.w3.org/2000/svg}"
    assert (root.get("width"), root.get("height")) == ("900", "560")
    assert len(root.findall(f"{space}circle")) == 36
    assert len(root.findall(f"{space}polygon")) == 1
    assert "Assistant" in [text.text for text in root.findall(f"{space}text")]
    evil = dataclasses.replace(fit.points[0], name=EVIL, projection=-99.0)
    ElementTree.fromstring(static_map_svg(dataclasses.replace(fit, points=[evil, *fit.points[1:]])))


def test_labels_never_cover_each_other_or_leave_the_area() -> None:
    rng = np.random.default_rng(3)
    dots = [Dot(float(x), float(y)) for x, y in rng.uniform(0, 300, (80, 2))]
    texts = [f"label {i}" for i in range(80)]
    spots = place_labels(dots, texts, range(80), (300, 300))
    boxes = [label_box(dots[i], texts[i], spot, 12) for i, spot in spots.items()]
    assert len(boxes) > 5
    assert 0 in spots
    assert not any(a.meets(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.left >= 0 and box.right <= 300 and box.top >= 0 and box.bottom <= 300 for box in boxes)


def test_colours_span_the_axis_and_groups_keep_theirs() -> None:
    assert axis_colour(-1, [-1, 1]) == "#c2570c"
    assert axis_colour(1, [-1, 1]) == "#174f91"
    assert axis_colour(5, [5, 5]) == axis_colour(0, [-1, 1])
    assert group_styles(["b", "a"]) == group_styles(["a", "b", "a"])
    assert len(set(group_styles(map(str, range(30))).values())) == 30


# ---------------------------------------------------------------- words, terminal


@pytest.mark.parametrize(
    ("cos", "reliability", "edge", "expected"),
    [
        (0.81, 0.97, -0.04, "Assistant Axis found at layer 15 of 30; |cos(axis, PC1)| = 0.81 [0.74, 0.86]; "),
        (0.81, 0.97, -0.04, "the Assistant lies 4 % of the range beyond the outermost role."),
        (0.81, 0.97, 0.2, "inside the roles' range, 20 % of it short of the outermost role."),
        (0.81, 0.5, -0.04, "No reliable axis"),
        (0.81, 0.8, -0.04, "A noisy Assistant Axis"),
        (0.3, 0.97, -0.04, "not the main direction"),
    ],
)
def test_the_verdict_says_what_was_found(cos: float, reliability: float, edge: float, expected: str) -> None:
    interval = Interval(cos, cos - 0.07, cos + 0.05)
    assert expected in verdict(Findings(15, 30, interval, reliability, Interval(edge, edge, edge)))


def test_numbers_in_words() -> None:
    assert magnitude(Interval(-0.8, -0.9, -0.7)) == Interval(0.8, 0.7, 0.9)
    assert magnitude(Interval(0.1, -0.3, 0.2)).low == 0
    assert [percent(x) for x in (0.04, -0.125, 0.004, math.nan)] == ["4 %", "-12 %", "0.4 %", "n/a"]
    assert [duration(s) for s in (8.42, 192, 7500)] == ["8.4 s", "3 min 12 s", "2 h 5 min"]
    assert [number(x) for x in (1.005, None, math.nan)] == ["1.00", "n/a", "n/a"]


def test_a_summary_alone_gives_the_same_verdict_without_intervals(fit: Fit) -> None:
    found = findings_of_summary(make_report(fit).summary)
    assert found is not None
    assert found.reliability == findings_of_fit(fit).reliability
    assert "[" not in verdict(found)
    assert findings_of_summary({"model": "m"}) is None


@pytest.mark.parametrize("n_roles", [3, 36, 275])
def test_the_terminal_summary_is_narrow_and_ascii(n_roles: int) -> None:
    fit = make_fit(n_roles)
    text = render_summary(make_report(fit).summary, fit, "runs/demo/report.html")
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    rows = [line for line in text.splitlines() if re.search(r"\[.*\].*[o#]", line)]
    assert len(rows) >= min(n_roles, 20) + 1
    assert "runs/demo/report.html" in text
    assert (f"{n_roles - 20} roles between" in text) == (n_roles > 20)


def test_the_terminal_summary_without_a_fit_names_the_roles(fit: Fit) -> None:
    text = render_summary(make_report(fit).summary, None, None)
    assert "least like" in text
    assert fit.ranking[0].name.replace("_", " ") in text
    assert "No axis was fitted." in render_summary({}, None, None)
