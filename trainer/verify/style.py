"""How a report looks: a sheet of paper, or the same in the dark."""

STYLE = """
:root {
  --paper: #fbfaf6; --sheet: #ffffff; --ink: #20242b; --soft: #5c6470; --rule: #dcdad2;
  --same: #22724b; --same-wash: #e8f3ec; --different: #b1361e; --different-wash: #fbeae6; --hot: 200 72 30;
  --series-1: #1f4e8c; --series-2: #c26a1a; --series-3: #2b7f62; --series-4: #8b3f86; --series-5: #86700f;
  --series-6: #4b8fb5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --sheet: #1b1e24; --ink: #e6e4dd; --soft: #a2a8b2; --rule: #343942;
    --same: #6cc79a; --same-wash: #17291f; --different: #f08a72; --different-wash: #331c17; --hot: 224 96 48;
    --series-1: #7fb0ee; --series-2: #f0a45d; --series-3: #6cc7a6; --series-4: #d291cd; --series-5: #d0b94f;
    --series-6: #8fcbe8;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font: 600 1.9rem/1.2 Georgia, "Iowan Old Style", "Times New Roman", serif; margin: 0 0 1.1rem; }
h2 { font: 600 1.15rem/1.3 Georgia, "Iowan Old Style", "Times New Roman", serif; margin: 0 0 .8rem; }
.verdict { display: flex; gap: 1rem; align-items: baseline; margin: 0; padding: .9rem 1.2rem; border-radius: 6px;
  border-left: 5px solid; }
.verdict strong { font-size: 1.15rem; }
.verdict span { color: var(--ink); }
.verdict.same { color: var(--same); background: var(--same-wash); }
.verdict.different { color: var(--different); background: var(--different-wash); }
dl { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; margin: 1.1rem 0 0; }
dt { color: var(--soft); font-size: .78rem; letter-spacing: .03em; }
dd { margin: 0; overflow-wrap: anywhere; }
section { margin-top: 2rem; padding: 1.3rem 1.5rem; background: var(--sheet); border: 1px solid var(--rule);
  border-radius: 8px; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem; vertical-align: bottom; }
th, td { padding: .34rem .8rem .34rem 0; border-bottom: 1px solid var(--rule); }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
th.number, td.number { text-align: right; white-space: nowrap; }
th.number:last-child, td.number:last-child { padding-right: .2rem; }
tr.different td { background: var(--different-wash); }
tr.different td:first-child, tr.same td:first-child { padding-left: .7rem; }
tr.different td:first-child { box-shadow: inset 3px 0 var(--different); }
tr.same td:first-child { box-shadow: inset 3px 0 var(--same); }
table.heat { width: auto; border-collapse: separate; border-spacing: 2px; font-size: .78rem; }
table.heat th, table.heat thead th { text-align: center; }
table.heat td { border: 0; padding: .16rem .5rem; white-space: nowrap; }
table.heat thead th { text-align: center; }
table.heat td { min-width: 3.6rem; text-align: center; border-radius: 3px; background: var(--paper); }
table.heat td.over { outline: 2px solid var(--different); outline-offset: -2px; font-weight: 600; }
.note { margin: .7rem 0 0; color: var(--soft); font-size: .85rem; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
