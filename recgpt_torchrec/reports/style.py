"""The style sheet of a report: light and dark, one column on a narrow screen. No font or image is loaded."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1a1d24; --soft: #5b6372; --faint: #8b93a1; --line: #e3e6eb;
  --grid: #edeff3;
  --good: #14734a; --good-bg: #e3f4eb; --bad: #b3261e; --bad-bg: #fbe9e7; --warn: #8a5a00; --warn-bg: #fdf1d7;
  --c0: #2f6bdb; --c1: #d9660f; --c2: #0f8f78; --c3: #9a3fc4; --c4: #c22f63; --c5: #6b7a12; --cb: #8c95a3;
  --cb2: #b9a26a; }
@media (prefers-color-scheme: dark) { :root {
  --page: #101216; --card: #191c22; --ink: #e8eaee; --soft: #a5adba; --faint: #7d8593; --line: #2b303a;
  --grid: #252a33;
  --good: #6fd3a3; --good-bg: #16342a; --bad: #ff9c92; --bad-bg: #42201d; --warn: #f0c064; --warn-bg: #3b2e12;
  --c0: #78a6ff; --c1: #ff9a52; --c2: #4fcdb4; --c3: #cf8cf2; --c4: #ff7ba6; --c5: #bccb58; --cb: #929baa;
  --cb2: #c9b47e; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -.005em; }
h3 { font-size: 15px; margin: 22px 0 8px; overflow-wrap: anywhere; } h3 small { font-weight: 400; font-size: 13px; }
p { margin: 0 0 10px; }
.lead, header p { color: var(--soft); max-width: 76ch; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 10px 0 0; font-size: 14px; }
a { color: var(--c0); text-decoration: none; }
a:hover { text-decoration: underline; }
section { margin: 24px 0 0; padding: 24px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
#summary { background: none; border: 0; padding: 0; }
#summary h2, #summary > .lead { display: none; }
code, .key { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .9em;
  overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 16px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px; min-width: 0;
  border-top: 3px solid var(--color, var(--line)); }
.card h3 { margin: 0; font-size: 16px; overflow-wrap: anywhere; }
.card .kind { color: var(--soft); font-size: 13px; margin: 0 0 12px; }
.big { font-size: 34px; line-height: 1.1; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.what { color: var(--soft); font-size: 13px; margin: 2px 0 12px; }
.verdicts { list-style: none; margin: 0; padding: 12px 0 0; border-top: 1px solid var(--line); font-size: 14px; }
.verdicts li { display: flex; flex-wrap: wrap; gap: 2px 8px; align-items: baseline; margin-top: 4px; }
.chip { display: inline-block; padding: 1px 8px; border-radius: 99px; font-size: 12px; font-weight: 550;
  white-space: nowrap; background: var(--grid); color: var(--soft); }
.good { color: var(--good); background: var(--good-bg); } .bad { color: var(--bad); background: var(--bad-bg); }
.warn { color: var(--warn); background: var(--warn-bg); }
.note { padding: 8px 12px; border-radius: 8px; font-size: 14px; margin: 8px 0; background: var(--warn-bg);
  color: var(--warn); overflow-wrap: anywhere; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: var(--color);
  margin-right: 6px;
  flex: none; }
.c0 { --color: var(--c0); } .c1 { --color: var(--c1); } .c2 { --color: var(--c2); } .c3 { --color: var(--c3); }
.c4 { --color: var(--c4); } .c5 { --color: var(--c5); } .cb { --color: var(--cb); } .cb2 { --color: var(--cb2); }
.p0 { --color: #d9660f; } .p1 { --color: #2f6bdb; } .p2 { --color: #4d97f0; } .p3 { --color: #93bdf7; }
.p4 { --color: #0f8f78; } .p5 { --color: #6cc7b3; } .p6 { --color: #9aa3b2; }
svg { display: block; overflow: visible; }
.grid { stroke: var(--grid); } .zero { stroke: var(--faint); stroke-dasharray: 3 3; }
.span { stroke: var(--color); stroke-width: 2; stroke-linecap: round; opacity: .55; }
circle.full, .full { fill: var(--color); } circle.hollow { fill: var(--card); stroke: var(--color); stroke-width: 2; }
.axis text { fill: var(--faint); font-size: 11px; }
.row { display: grid; grid-template-columns: 260px minmax(0, 1fr) 200px; gap: 0 16px; align-items: center;
  padding: 2px 0; }
.wide .row { grid-template-columns: 330px minmax(0, 1fr) 250px; }
  .slim .row { grid-template-columns: 150px minmax(0, 1fr); }
.row > * { min-width: 0; }
.name { font-size: 14px; overflow-wrap: anywhere; } .name small, .figure small, h3 small { color: var(--faint); }
.figure { font-variant-numeric: tabular-nums; font-size: 14px; text-align: right; white-space: nowrap; }
.track { padding: 0 6px; } .axis { padding: 0 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); margin: 8px 0; }
.legend span { display: inline-flex; align-items: center; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 24px 28px;
  margin-top: 12px; }
.chart { margin: 0; min-width: 0; } figcaption { font-size: 13px; font-weight: 600; margin-bottom: 8px; }
.frame { display: grid; grid-template-columns: 46px minmax(0, 1fr); }
.ys { position: relative; font-size: 11px; color: var(--faint); font-variant-numeric: tabular-nums; }
.ys span { position: absolute; right: 8px; transform: translateY(-50%); }
.xs { display: flex; justify-content: space-between; padding: 6px 0 0 46px; font-size: 11px; color: var(--faint); }
polyline { fill: none; stroke: var(--color); stroke-width: 1.8; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; }
.scroll { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 14px 6px 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 550; font-size: 13px; white-space: nowrap; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding: 6px 0 6px 14px; }
.n small { display: block; color: var(--faint); font-size: 11px; }
.n + :not(.n) { padding-left: 14px; }
dl { display: grid; grid-template-columns: minmax(120px, 190px) minmax(0, 1fr); gap: 4px 16px; margin: 8px 0;
  font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--c0); font-size: 14px; padding: 4px 0; }
.shares { display: flex; height: 16px; border-radius: 4px; overflow: hidden; margin-top: 6px; }
.shares i { background: var(--color); }
.blocks { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 8px 40px; }
.example { border-top: 1px solid var(--line); padding: 16px 0 4px; margin-top: 16px; }
.example h3 { margin: 0 0 6px; }
.items { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; margin: 4px 0 10px; padding: 0;
  font-size: 13px; }
.items li { border: 1px solid var(--line); border-radius: 6px; padding: 2px 8px; max-width: 100%;
  overflow-wrap: anywhere; }
.items .prompt { border-style: dashed; color: var(--soft); }
.items .prompt small { color: var(--faint); display: block; font-size: 11px; line-height: 1.2; }
.items .target, .lists .target { border-color: var(--good); color: var(--good); background: var(--good-bg);
  font-weight: 600; }
.lists { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 8px 24px; font-size: 13px; }
.lists ol { margin: 4px 0 8px; padding-left: 24px; }
.lists li { padding: 1px 4px; border-radius: 4px; overflow-wrap: anywhere; }
.lists h4 { margin: 4px 0 0; font-size: 13px; }
.label { color: var(--soft); font-size: 12px; margin: 0; }
.meter { display: inline-block; width: 90px; height: 6px; border-radius: 3px; background: var(--grid);
  vertical-align: middle; margin-left: 10px; overflow: hidden; } .meter i { display: block; height: 100%;
  background: var(--color); }
footer { color: var(--faint); font-size: 13px; padding-top: 24px; padding-bottom: 40px; }
@media (max-width: 640px) {
  main, header, footer { padding-left: 14px; padding-right: 14px; } header { padding-top: 24px; }
  h1 { font-size: 23px; } section { padding: 16px 14px; margin-top: 16px; border-radius: 10px; }
  .row, .wide .row, .slim .row { grid-template-columns: minmax(0, 1fr) auto; padding: 4px 0; }
  .row .plot-cell { grid-area: 2 / 1 / 3 / 3; margin-top: 2px; } .figure small { display: none; }
  .axis-row .plot-cell { grid-area: 1 / 1 / 2 / 3; } .gap { display: none; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: 8px; }
  .charts { grid-template-columns: minmax(0, 1fr); } .meter { display: none; }
  .lists { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px 14px; }
  th, td { padding-right: 8px; }
  .n { padding-left: 8px; } }
@media print { section, .card { break-inside: avoid; } nav { display: none; } }
"""
