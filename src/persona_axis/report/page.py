"""The page's style sheet and its one script, as text: the report is a single file that loads nothing."""

from __future__ import annotations

from persona_axis.report.look import FONT, INK, MUTED, RULE

CSS = """
:root { color-scheme: light; --ink: INK; --muted: MUTED; --rule: RULE; --tint: #f6f8fa; --blue: #174f91; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 FONT; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 28px 72px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 4px 0 14px; text-wrap: balance; }
h2 { font-size: 21px; line-height: 1.3; letter-spacing: -0.01em; margin: 56px 0 6px; padding-top: 8px; }
h3 { font-size: 16px; margin: 0 0 4px; }
p { margin: 0 0 12px; max-width: 74ch; }
.eyebrow { color: var(--muted); font-size: 13px; margin: 0; }
.verdict { font-size: 19px; line-height: 1.5; margin-bottom: 20px; max-width: 68ch; text-wrap: pretty; }
.muted { color: var(--muted); }
code { font: 0.88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }

nav { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 10px 0; margin: 24px 0 0; font-size: 14px;
  border-block: 1px solid var(--rule); }
a { color: var(--blue); text-decoration: none; }
a:hover { text-decoration: underline; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); gap: 12px; margin: 0; }
.tile { background: var(--tint); border-radius: 8px; padding: 14px 16px; }
.tile dt { font-size: 13px; color: var(--muted); }
.tile dd { margin: 0; font-size: 25px; font-weight: 600; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.tile dd small { display: block; font-size: 13px; font-weight: 400; letter-spacing: 0; color: var(--muted); }

.callout { border-left: 3px solid #c2570c; background: #fdf6f0; padding: 10px 14px; margin: 16px 0 0;
  border-radius: 0 6px 6px 0; font-size: 15px; max-width: none; }
.facts { display: grid; grid-template-columns: 1fr 1fr; gap: 0 40px; margin: 10px 0 0; font-size: 14.5px; }
.facts div { display: grid; grid-template-columns: 128px 1fr; gap: 12px; padding: 7px 0;
  border-bottom: 1px solid var(--rule); }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }

figure { margin: 14px 0 0; min-width: 0; }
figcaption { color: var(--muted); font-size: 14.5px; line-height: 1.5; margin-top: 6px; max-width: 92ch; }
.scroll { max-height: 740px; overflow-y: auto; border-block: 1px solid var(--rule); }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 36px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; padding: 0; margin: 12px 0 0;
  font-size: 13.5px; }
.legend svg { width: 11px; height: 11px; margin-right: 6px; }

details { border-top: 1px solid var(--rule); }
details:last-of-type { border-bottom: 1px solid var(--rule); }
summary { cursor: pointer; padding: 10px 2px; display: flex; flex-wrap: wrap; gap: 0 12px;
  align-items: baseline; list-style: none; }
summary::-webkit-details-marker { display: none; }
summary::before { content: "+"; color: var(--muted); width: 12px; font-weight: 600; }
details[open] > summary::before { content: "\\2212"; }
summary b { font-weight: 600; }
summary .muted { font-size: 14px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 14px;
  padding: 4px 0 20px; }
.card { border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; font-size: 14.5px;
  min-width: 0; }
.card.dropped { background: var(--tint); }
.card header { display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: center; margin-bottom: 10px;
  font-size: 13px; }
.badge { border-radius: 999px; padding: 1px 9px; font-size: 12.5px; background: #e8eef6; color: #123f75;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.badge.kept { background: #e4f1e6; color: #23602b; }
.badge.dropped { background: #f6e7dc; color: #8a3d08; }
.card dt, .replies h4 { font-size: 12.5px; font-weight: 400; color: var(--muted); margin: 0; }
.card dd { margin: 0 0 10px; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
.card .reply { border-left: 2px solid #b9cbe0; padding-left: 10px; }
.held-row { border-top: 1px solid var(--rule); padding: 14px 0 18px; }
.replies { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 20px; font-size: 14.5px;
  margin-top: 8px; }
.replies p { margin: 2px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; margin-top: 10px; }
th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 400; color: var(--muted); }
footer { margin-top: 56px; color: var(--muted); font-size: 13.5px; }

@media screen and (max-width: 760px) {
  main { padding: 24px 16px 48px; }
  h1 { font-size: 24px; }
  h2 { margin-top: 44px; }
  .verdict { font-size: 17px; }
  .facts, .pair, .replies { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 12px; }
  .tile dd { font-size: 21px; }
  .facts div { grid-template-columns: 112px 1fr; }
}
@media print {
  @page { margin: 16mm 14mm; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  nav, .screen-only, .modebar-container { display: none; }
  h2, h2 + p { break-after: avoid; }
  h2 { margin-top: 28px; }
  .tiles { grid-template-columns: repeat(4, 1fr); gap: 8px; }
  .tile { padding: 10px 12px; }
  .tile dd { font-size: 15pt; }
  .facts, .card, .replies, figcaption, table { font-size: 9.5pt; }
  .facts { gap: 0 24px; }
  .facts div { grid-template-columns: 100px 1fr; }
  figure:not(.tall), .card, .tile, .held-row { break-inside: avoid; }
  .scroll { max-height: none; overflow: visible; }
  .pair { gap: 20px; }
  .tile, .callout, .badge, .card { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
CSS = CSS.replace("INK", INK).replace("MUTED", MUTED).replace("RULE", RULE).replace("FONT", FONT)

# Figures are drawn from one JSON block. On a touch screen dragging scrolls the page, it does not zoom.
SCRIPT = """
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const narrow = window.matchMedia("(max-width: 640px)");
const touch = window.matchMedia("(pointer: coarse)").matches;
// Plotly's default offers to send a figure to its cloud; a report stays where it is.
const config = { displaylogo: false, responsive: true, scrollZoom: false, showSendToCloud: false,
  plotlyServerURL: "", displayModeBar: touch ? false : "hover" };
const flatButtons = [["toImage", "resetScale2d"]];
const solidButtons = [["toImage", "resetCameraDefault3d"]];
const drawn = [];

function hideWideOnly(area, traces) {
  const indices = traces.flatMap((trace, i) => (trace.meta === "wide-only" ? [i] : []));
  if (indices.length) Plotly.restyle(area, { visible: !narrow.matches }, indices);
}

// A 3-D figure keeps its size when the page narrows, and would be cut off.
function stepBack(eye) {
  for (const side of ["x", "y", "z"]) eye[side] *= 2.3;
}

for (const [id, figure] of Object.entries(figures)) {
  const area = document.getElementById(id);
  const solid = "scene" in figure.layout;
  if (touch && !solid) figure.layout.dragmode = false;
  if (narrow.matches && solid) stepBack(figure.layout.scene.camera.eye);
  const modeBarButtons = solid ? solidButtons : flatButtons;
  Plotly.newPlot(area, figure.data, figure.layout, { ...config, modeBarButtons });
  drawn.push(area);
  hideWideOnly(area, figure.data);
  narrow.addEventListener("change", () => hideWideOnly(area, figure.data));
}

// Paper is narrower than the screen; a figure drawn for the screen would be cut off.
window.addEventListener("beforeprint", () => drawn.forEach((area) =>
  Plotly.relayout(area, { width: area.closest(".pair") ? 320 : 660, autosize: false })));
window.addEventListener("afterprint", () =>
  drawn.forEach((area) => Plotly.relayout(area, { width: null, autosize: true })));
"""
