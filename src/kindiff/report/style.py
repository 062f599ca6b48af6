"""What every page carries: its style sheet and its script. Nothing is fetched from anywhere."""

STYLE = """
:root { color-scheme: light dark;
  --ink: light-dark(#1c1e21, #e6e6e3); --soft: light-dark(#5c6370, #a0a6ad);
  --paper: light-dark(#fdfdfb, #17181a); --line: light-dark(#d9dbd6, #36393d);
  --tint: light-dark(#f2f3ef, #202225); --good: light-dark(#e6f0fb, #1b2a3d);
  --s0: light-dark(#0b62c4, #6aa9ff); --s1: light-dark(#b85000, #ff9f4a); --s2: light-dark(#5c6370, #b4bac2);
  --s3: light-dark(#007a5a, #3ecf9f); --s4: light-dark(#8d3196, #d38be0);
  --less: light-dark(#b85000, #d9762b); --more: light-dark(#0b62c4, #5b9df0); }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 5rem .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .2rem; }
p, li { max-width: 44rem; margin: .4rem 0; } ul { padding-left: 1.2rem; margin: .4rem 0; }
.soft, figcaption { color: var(--soft); } p.strong { font-size: 1.1rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .55rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child, .words { text-align: left; }
tr.mark td { background: var(--good); }
th button { all: unset; cursor: pointer; }
th button:focus-visible, #theme:focus-visible { outline: 2px solid var(--s0); }
th button::after { content: "\\2195"; opacity: .35; padding-left: .25em; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
.sheet td, .sheet th { text-align: left; padding: .15rem .4rem; border: 0; vertical-align: middle; }
.sheet img { display: block; image-rendering: pixelated; border-radius: 3px; background: var(--tint); }
.sheet th[scope=row] { position: sticky; left: 0; background: var(--paper); color: var(--ink); font-weight: 400;
  white-space: normal; max-width: 12rem; min-width: 6rem; }
.wide td, .wide th { padding: .1rem .2rem; } .wide thead th { font-weight: 400; font-size: .75rem;
  white-space: normal; vertical-align: bottom; }
.wide th[scope=row] { min-width: 9rem; } td.words { white-space: normal; min-width: 7.5rem; max-width: 16rem; }
code { background: var(--tint); padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: .5rem 2rem; }
figure { margin: .8rem 0; min-width: 0; } figcaption { font-size: .9rem; margin-bottom: .2rem; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--ink); }
svg .axis { fill: var(--soft); } svg .grid { stroke: var(--line); }
svg .rule { stroke: var(--ink); stroke-dasharray: 4 3; }
svg .front { stroke: var(--soft); fill: none; stroke-dasharray: 1 3; stroke-width: 1.5; }
svg text { paint-order: stroke; stroke: var(--paper); stroke-width: 2px; } svg rect + text, svg .bare { stroke: none; }
.s0 { --series: var(--s0); } .s1 { --series: var(--s1); } .s2 { --series: var(--s2); }
.s3 { --series: var(--s3); } .s4 { --series: var(--s4); }
svg .point { fill: var(--series); } svg .stem, svg .trace { stroke: var(--series); fill: none; }
svg .trace { stroke-width: 1.6; } svg .strong .trace { stroke-width: 3; }
svg .strong text, tr.mark td:first-child { font-weight: 600; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .45em; background: var(--series); }
.keys { display: flex; flex-wrap: wrap; gap: 0 1.2rem; font-size: .9rem; }
#theme { position: absolute; top: 1.4rem; right: max(1rem, calc(50vw - 32rem)); font: inherit; font-size: .85rem;
  color: var(--ink); background: var(--tint); border: 1px solid var(--line); border-radius: 1rem;
  padding: .15rem .8rem; cursor: pointer; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); }
@media (max-width: 40rem) { svg { font-size: 13px; } .sheet { font-size: .75rem; }
  .sheet:not(.wide) td, .sheet:not(.wide) th { white-space: normal; } .sheet th[scope=row] { min-width: 0; }
  .sheet:not(.wide) img { width: 20vw; height: auto; } .wide th[scope=row] { max-width: 6.5rem; min-width: 5.5rem; } }
@media print { #theme { display: none; } }
"""

SCRIPT = """
const theme = document.getElementById("theme"), themes = {auto: "light dark", light: "light", dark: "dark"};
theme.hidden = false;
theme.addEventListener("click", () => {
  const names = Object.keys(themes), next = names[(names.indexOf(theme.dataset.theme) + 1) % names.length];
  theme.dataset.theme = next;
  theme.textContent = "Theme: " + next;
  document.documentElement.style.colorScheme = themes[next];
});
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[column], number = cell.dataset.order;
        return number === undefined ? cell.textContent : number === "" ? NaN : Number(number);
      };
      const compare = (a, b) => {
        const x = value(a), y = value(b);
        if (typeof x === "string" || typeof y === "string") return String(x).localeCompare(String(y));
        return x - y;
      };
      const missing = (row) => Number.isNaN(value(row));  // what has no number stays at the end
      const rows = [...table.tBodies[0].rows].sort(
        (a, b) => missing(a) - missing(b) || (missing(a) ? 0 : (falling ? -1 : 1) * compare(a, b)));
      table.tBodies[0].append(...rows);
    });
  });
}
"""
