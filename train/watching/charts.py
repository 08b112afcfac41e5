"""Small charts as HTML with inline SVG: curves over tokens, a heat map, a bar of shares; and tables.

Curves are stretched to whatever width the page has, by an SVG without an aspect ratio; all text is HTML over
it, so that it keeps its size. Colours are the page's CSS variables, so that light and dark are its matter. The one
invariant: everything that comes from a run is escaped, and what is not finite is left out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

# Points of a curve on a page; of more, each drawn one is the mean of several, over a band from least to most.
MOST_POINTS = 500
NUM_COLORS = 8

# The look of a page with charts; a colour is a class c0, c1, ...
STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1d2127; --soft: #667080; --rule: #e3e4e1;
  --full: 66, 105, 208; --good: #2c8a4b; --bad: #c8402f;
  --c0: #4269d0; --c1: #e8623b; --c2: #3a9a54; --c3: #9a5be0; --c4: #c99700; --c5: #e0609a; --c6: #2fa3a0;
  --c7: #8a6a4f }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f25; --ink: #e6e8ec; --soft: #969fae;
  --rule: #30353e; --full: 110, 150, 255; --good: #5cc27d; --bad: #ff7b6b;
  --c0: #7397ff; --c1: #ff8a66; --c2: #62c67e; --c3: #bb8bff; --c4: #e9bc3b; --c5: #ff8fbd; --c6: #5bcac7;
  --c7: #c3a183 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 32px 20px 64px; max-width: 1200px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 28px; letter-spacing: -.01em; overflow-wrap: anywhere }
h2 { margin: 36px 0 0; font-size: 18px }
p { margin: 4px 0 }
small, .soft { color: var(--soft); font-size: 13px; font-weight: 400 }
.good { color: var(--good) } .bad { color: var(--bad) } .good, .bad { font-weight: 600 }
section { display: grid; gap: 14px }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)) }
.tiles { display: grid; gap: 12px; margin-top: 20px; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)) }
.card, figure, .tiles > div { margin: 0; padding: 14px 16px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; min-width: 0 }
.tiles b { display: block; font-size: 22px; font-weight: 600; letter-spacing: -.01em }
.card { overflow-x: auto }
figcaption { font-weight: 600; margin-bottom: 10px }
.plot { position: relative; height: 190px; margin: 0 10px 26px 42px }
.tall { height: 340px }
svg { position: absolute; width: 100%; height: 100%; overflow: visible; clip-path: inset(0 -6px) }
.plot span { position: absolute; color: var(--soft); font-size: 12px; line-height: 1; white-space: nowrap }
.plot .y { right: 100%; margin-right: 7px; transform: translateY(-50%) }
.plot .x { top: 100%; margin-top: 8px; transform: translateX(-50%) }
.plot .at { top: 2px; padding: 0 4px } .plot .end { transform: translateX(-100%) }
svg path { fill: none; vector-effect: non-scaling-stroke }
.grid-line, .mark { stroke: var(--rule) }
.mark { stroke-dasharray: 3 3; stroke: var(--soft); opacity: .6 }
path.line { stroke: var(--k); stroke-width: 1.6; stroke-linejoin: round }
path.thin { stroke: var(--k); stroke-width: 1.2; opacity: .55 }
path.dots, path.halo { stroke: var(--k); stroke-width: 6; stroke-linecap: round }
path.halo { stroke: var(--card); stroke-width: 10 }
path.band { fill: var(--k); opacity: .18 }
.c0 { --k: var(--c0) } .c1 { --k: var(--c1) } .c2 { --k: var(--c2) } .c3 { --k: var(--c3) }
.c4 { --k: var(--c4) } .c5 { --k: var(--c5) } .c6 { --k: var(--c6) } .c7 { --k: var(--c7) } .c8 { --k: var(--rule) }
.key { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0; padding: 0; list-style: none; font-size: 13px }
.key i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: 4px; background: var(--k);
  border-radius: 2px }
.key i.dot { width: 9px; height: 9px; vertical-align: 0; border-radius: 50% }
.bar { display: flex; height: 22px; margin-bottom: 12px; border-radius: 6px; overflow: hidden; gap: 1px }
.bar i { flex-basis: 0; min-width: 2px; background: var(--k) }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--soft); font-weight: 500; white-space: nowrap }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; white-space: nowrap }
td.long { min-width: 280px; white-space: normal; overflow-wrap: anywhere }
tr:last-child > * { border-bottom: 0 }
.heat { width: auto } .heat th { padding: 4px 8px; border: 0; text-align: center }
.heat td { width: 56px; padding: 7px; border: 2px solid var(--card); text-align: center; font-size: 12px;
  background: rgba(var(--full), calc(.08 + .6 * var(--share, 0))) }
"""

# The part of the values that the y-axis shows in full; the first steps and spikes may leave it above.
_SHOWN = 0.98
_SIZE = 1000  # of an SVG in its own units
_LONG = 40  # characters of a cell that may have several lines

Point = tuple[float, float]


class Series(NamedTuple):
    """A curve, or with dots=True a sparse one with a dot a point."""

    label: str
    points: Sequence[Point]
    color: int = 0
    dots: bool = False


class Axis:
    """Values from low to high on 0 to 1, linear or logarithmic."""

    def __init__(self, low: float, high: float, *, log: bool = False):
        """A range of no width gets one."""
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
            margin = 0.5 if log else abs(high) / 2 or 0.5
            low, high = low - margin, high + margin
        self.low, self.high, self.log = low, high, log

    def at(self, value: float) -> float:
        """Where a value is; beyond the range it is below 0 or above 1."""
        value = math.log10(max(value, 1e-300)) if self.log else value
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Some round values in the range."""
        if self.log:
            factors = (1,) if self.high - self.low > 2 else (1, 2, 5) if self.high - self.low > 0.7 else range(1, 10)
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            stride = max(1, round((self.high - self.low) / 5))
            values = [f * 10.0**p for p in powers if p % stride == 0 for f in factors]
            return [value for value in values if -1e-9 <= self.at(value) <= 1 + 1e-9]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    log: bool = False,
    zero: bool = False,
    percent: bool = False,
    marks: Iterable[tuple[float, str]] = (),
    tall: bool = False,
) -> str:
    """A figure with curves over tokens; "" if there is nothing to draw.

    log, zero: the y-axis is logarithmic, begins at 0. percent: y is a share. marks: x and text of vertical lines.
    """
    series = [s._replace(points=_finite(s.points, log)) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    every = [point for s in series for point in s.points]
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    x_axis = Axis(0.0 if first < last / 5 else first, last)
    y_axis = _y_axis([y for _, y in every], log=log, from_zero=zero or percent)
    curves = "".join(_curve(s, x_axis, y_axis) for s in series)
    grid = "".join(f'<path d="M0 {_down(y_axis.at(y))}H{_SIZE}" class="grid-line"/>' for y in y_axis.ticks())
    labels = "".join(_y_label(y_axis.at(y), text) for y, text in _told(y_axis, percent=percent))
    labels += "".join(_x_label(x_axis.at(x), text, "x") for x, text in _told(x_axis))
    for x, text in marks:
        grid += f'<path d="M{_SIZE * x_axis.at(x):.1f} 0V{_SIZE}" class="mark"/>'
        labels += _x_label(x_axis.at(x), escape(text), "at end" if x_axis.at(x) > 0.85 else "at")
    named = [s for s in series if s.label]
    keys = "".join(
        f'<li><i class="c{s.color % NUM_COLORS}{" dot" if s.dots else ""}"></i>{escape(s.label)}</li>' for s in named
    )
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<figure><figcaption>{escape(title)}{unit}</figcaption><div class="plot{" tall" if tall else ""}">'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f"{grid}{curves}</svg>{labels}</div>{f'<ul class=key>{keys}</ul>' if keys else ''}</figure>"
    )


def _finite(points: Sequence[Point], log: bool) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]


def _y_axis(values: list[float], *, log: bool, from_zero: bool) -> Axis:
    values = sorted(values)
    low, high = values[0], values[min(len(values) - 1, math.ceil(_SHOWN * len(values)))]
    if from_zero:
        return Axis(0.0, 1.1 * high)
    if log:
        return Axis(low / 1.2, high * 1.2, log=True)
    margin = 0.06 * (high - low)
    return Axis(low - margin if low - margin > 0 or low < 0 else 0.0, high + margin)


def _curve(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    color = f"c{series.color % NUM_COLORS}"
    parts = _thinned(series.points)
    path = _path([(x, mean) for x, mean, _, _ in parts], x_axis, y_axis)
    if series.dots or len(parts) == 1:
        dots = "".join(f"M{_place(x, y, x_axis, y_axis)}h0" for x, y, _, _ in parts)
        line = f'<path d="M{path}" class="thin {color}"/>'
        return f'{line}<path d="{dots}" class="halo"/><path d="{dots}" class="dots {color}"/>'
    band = ""
    if len(parts) < len(series.points):
        outline = [(x, high) for x, _, _, high in parts] + [(x, low) for x, _, low, _ in reversed(parts)]
        band = f'<path d="M{_path(outline, x_axis, y_axis)}Z" class="band {color}"/>'
    return f'{band}<path d="M{path}" class="line {color}"/>'


def _thinned(points: Sequence[Point]) -> list[tuple[float, float, float, float]]:
    """x, mean, least and most of y of at most MOST_POINTS groups of neighbours."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    ys = ([y for _, y in group] for group in groups)
    return [(group[len(group) // 2][0], sum(y) / len(y), min(y), max(y)) for group, y in zip(groups, ys, strict=True)]


def _path(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    return "L".join(_place(x, y, x_axis, y_axis) for x, y in points)


def _place(x: float, y: float, x_axis: Axis, y_axis: Axis) -> str:
    return f"{_SIZE * x_axis.at(x):.1f} {_down(y_axis.at(y))}"


def _down(share: float) -> str:
    """SVG counts from the top; what is far outside stays near, because browsers draw in float32."""
    return f"{_SIZE * (1 - min(3.0, max(-2.0, share))):.1f}"


def _x_label(share: float, text: str, kind: str) -> str:
    return f'<span class="{kind}" style="left:{100 * share:.2f}%">{text}</span>'


def _y_label(share: float, text: str) -> str:
    return f'<span class="y" style="top:{100 * (1 - share):.2f}%">{text}</span>'


def _told(axis: Axis, *, percent: bool = False) -> list[tuple[float, str]]:
    """The ticks of an axis with their texts, which have as many digits as tell them apart."""
    ticks = axis.ticks()
    for digits in (3, 4, 5, 6):
        texts = [f"{100 * tick:.{digits}g}%" if percent else number(tick, digits) for tick in ticks]
        if len(set(texts)) == len(texts):
            break
    return list(zip(ticks, texts, strict=True))


def heat_map(rows: Sequence[str], columns: Sequence[str], shares: Mapping[tuple[str, str], float]) -> str:
    """A table of shares from 0 to 1 by (row, column), coloured; the fuller the darker."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = ""
    for row in rows:
        cells = ""
        for column in columns:
            share = shares.get((row, column))
            cells += "<td></td>" if share is None else f'<td style="--share:{share:.3f}">{100 * share:.0f}</td>'
        body += f"<tr><th>{escape(row)}</th>{cells}</tr>"
    return f'<table class="heat"><tr><th></th>{head}</tr>{body}</table>'


def share_bar(parts: Sequence[tuple[str, float]]) -> str:
    """One bar of coloured parts, whose shares sum to 1, with their names."""
    shown = [(min(i, NUM_COLORS), label, share) for i, (label, share) in enumerate(parts) if share > 0]
    bar = "".join(f'<i class="c{i}" style="flex-grow:{share:.6f}"></i>' for i, _, share in shown)
    keys = "".join(f'<li><i class="c{i} dot"></i>{escape(label)} <b>{share:.1%}</b></li>' for i, label, share in shown)
    return f'<div class="bar">{bar}</div><ul class="key">{keys}</ul>'


class Html(str):
    """Text that is HTML already, and is not escaped."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A card with a table; "" without rows."""
    if not rows:
        return ""
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="card"><table><tr>{names}</tr>{lines}</table></div>'


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > _LONG else ""
    return f"<td{kind}>{text if isinstance(text, Html) else escape(text)}</td>"


def number(value: float, digits: int = 3) -> str:
    """A number as short as it can be read: 0, 0.25, 8e-5, 950, 12K, 3.5M, 15T."""
    size = abs(value)
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if size >= 0.9995 * scale:
            return f"{value / scale:.{digits}g}{unit}"
    return f"{value:.{digits}g}".replace("e-0", "e-") if size >= 1e-12 else "0"
