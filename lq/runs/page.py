"""The look of the report: one HTML page that carries its style with it and asks the network for nothing."""

from html import escape

_CSS = """
:root { --ink: #1d2126; --muted: #686e76; --grid: #e1e4e8; --shade: #dde1e6; --paper: #fefefe;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --muted: #9aa2ab; --grid: #32383f; --shade: #3a4149; --paper: #14171a; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 var(--sans); }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1, h2, .lead { font-family: Charter, "Iowan Old Style", Georgia, "Liberation Serif", "Times New Roman", serif; }
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.3rem); font-weight: 600; line-height: 1.15; margin: 0 0 .7rem;
  text-wrap: balance; }
h2 { font-size: 1.5rem; font-weight: 600; line-height: 1.2; margin: 0 0 .6rem; }
h3 { font-size: 1rem; font-weight: 650; margin: 2.6rem 0 .7rem; }
p { margin: 0 0 .8rem; max-width: 44rem; }
.lead { font-size: 1.18rem; line-height: 1.45; margin-bottom: 1.6rem; }
.note, figcaption { color: var(--muted); font-size: .875rem; line-height: 1.45; }
section + section { margin-top: 3.5rem; padding-top: 2.5rem; border-top: 1px solid var(--grid); }
h1, h2, p, dd, summary { overflow-wrap: anywhere; }

dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .35rem 1.25rem; margin: 0; padding: .9rem 0;
  border: solid var(--grid); border-width: 1px 0; font-size: .9rem; }
dt { font-weight: 600; }
dd { margin: 0; }
dd span { display: inline-block; margin-right: 1.1em; }
dd i { color: var(--muted); font-style: normal; }

/* A shade at the right edge while there is more to scroll to; its cover travels with the end of the table. */
.scroll { overflow-x: auto; margin-bottom: .7rem; border: solid var(--ink); border-width: 1.5px 0;
  background: linear-gradient(var(--paper), var(--paper)) right / 1rem 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .875rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th, td { padding: .28rem 0 .28rem 1.1rem; text-align: right; vertical-align: baseline; white-space: nowrap;
  font-weight: 400; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
thead th { vertical-align: bottom; border-bottom: 1px solid var(--ink); }
thead abbr { text-decoration: none; }
.group th:first-child { padding-top: .75rem; font-weight: 600; position: static; background: none; }
.group span { display: inline-block; position: sticky; left: 0; }
tbody:not(:last-child) tr:last-child > * { border-bottom: 1px solid var(--grid); }
.best th, .best td { font-weight: 650; }
.best small { color: var(--muted); font-weight: 400; }
td small { color: var(--muted); display: block; }
.key { display: inline-block; width: .62em; height: .62em; margin-right: .5em; border-radius: 50%; border: 2px solid; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--muted); font-size: .875rem; margin-bottom: .6rem; }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 2rem 2.5rem;
  align-items: start; }
.figures > div { display: grid; gap: 2rem; }
figure { margin: 0; max-width: 34rem; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg text { font-family: var(--sans) !important; }
figcaption { margin-top: .5rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .5rem; }
  th, td { padding-left: .7rem; }
  thead th { white-space: normal; }
  table { font-size: .8125rem; }
  tbody th:first-child { min-width: 8.5rem; max-width: 11rem; white-space: normal; }
  .group th:first-child { max-width: none; white-space: nowrap; }
}
@media print {
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  figure, tr { break-inside: avoid; }
}
"""


def page(title: str, body: str) -> str:
    """A whole document. `title` is plain text, `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
