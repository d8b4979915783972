"""The pictures of the report page as inline SVG: a few kilobytes each, sharp in print, colored by the page's CSS.

A charting library would add megabytes of script to each page for five still pictures. Every picture is `WIDTH` units
wide, so that its text stays readable on a phone; every mark has its values as a `<title>`, for pointers and screen
readers. A point shows them in the picture too, while it is under the pointer or has the keyboard's focus.
`ElementTree` escapes names from users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

WIDTH = 400
_ROW = 26
_RIGHT = 16
_LETTER = 6.9  # width of a letter at the font size of the pictures
_LONGEST = 16  # letters of a name that fit in a picture

Say = Callable[[float], str]
"""Formats a value with its unit."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Values to pixels; logarithmic where `log`. `low` < `high`, both greater than zero where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside the axis are at its ends."""
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, self._inside(value)))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def _inside(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values on the axis, about `count` of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [digit * 10.0**power for power in decades for digit in digits]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= count + 1:
                    return found
            return found[:: math.ceil(len(found) / count)]
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw)
        return [index * step for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


_HIGHEST = 1e300  # the largest floats have no round number above them


def axis(values: Sequence[float], start: float, end: float, *, log: bool) -> Axis:
    """An axis with room for all values; a logarithmic one ignores those not greater than zero."""
    values = [min(value, _HIGHEST) for value in values if value > 0] if log else values
    low, high = min(values, default=1.0), max(values, default=1.0)
    if log:
        return Axis(low / 1.25, high * 1.25, start, end, log=True)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room, start, end, log=False)


# --- pictures ---------------------------------------------------------------------------------------------------------


def boxes(samples: Mapping[str, Sequence[float]], say: Say) -> str:
    """Raw samples as dots, with a box from the first to the third quartile and whiskers from the 5th to the 95th %."""
    left = _left(samples)
    x = axis([value for row in samples.values() for value in row], left, WIDTH - _RIGHT, log=True)
    svg, rows = _rows(samples, x, say, left)
    for name, y in rows.items():
        p5, p25, p50, p75, p95 = (float(value) for value in np.percentile(samples[name], [5, 25, 50, 75, 95]))
        title = f"{name}: median {say(p50)}, quartiles {say(p25)} to {say(p75)}, 5 to 95 % {say(p5)} to {say(p95)}"
        group = _titled(svg, title)
        # dots are spread in the order of the calls, so that a machine that slows down shows as a slope
        spread = [y - 7 + 14 * (index % 20) / 19 for index in range(len(samples[name]))]
        path = "".join(f"M{x(v):.1f} {at:.1f}h0" for v, at in zip(samples[name], spread, strict=True))
        _add(group, "path", "raw", d=path)
        _add(group, "path", "whisker", d=f"M{x(p5):.1f} {y}H{x(p25):.1f}M{x(p75):.1f} {y}H{x(p95):.1f}")
        _add(group, "rect", "box", x=x(p25), y=y - 6, width=max(x(p75) - x(p25), 1), height=12, rx=2)
        _add(group, "path", "median", d=f"M{x(p50):.1f} {y - 8}v16")
    return _text_of(svg)


def dots(errors: Mapping[str, tuple[float, float | None]], say: Say) -> str:
    """The error of each row as a dot, and the noise floor as a line across it."""
    left = _left(errors)
    figures = [value for pair in errors.values() for value in pair if value]
    # zero is not on a logarithmic axis, so it is drawn at the left end
    exact = left + 8
    x = axis(figures, left + 34, WIDTH - _RIGHT, log=True)
    svg, rows = _rows(errors, x, say, left)
    _add(svg, "text", "tick", "0", x=exact, y=12, text_anchor="middle")
    for name, y in rows.items():
        error, floor = errors[name]
        at, ground = (x(value) if value else exact for value in (error, floor))
        beside = "" if floor is None else f", noise floor {say(floor)}"
        group = _titled(svg, f"{name}: max error {say(error)}{beside}")
        if floor is not None:
            _add(group, "path", "stem", d=f"M{min(at, ground):.1f} {y}H{max(at, ground):.1f}")
            _add(group, "path", "floor", d=f"M{ground:.1f} {y - 8}v16")
        _add(group, "circle", "dot", cx=at, cy=y, r=4.5)
    return _text_of(svg)


def bars(values: Mapping[str, float], say: Say) -> str:
    """One bar per row, from zero, with its value after it."""
    left = _left(values)
    x = Axis(0.0, max(values.values(), default=1.0) or 1.0, left, WIDTH - 74, log=False)
    svg, rows = _rows(values, None, say, left)
    for name, y in rows.items():
        group = _titled(svg, f"{name}: {say(values[name])}")
        _add(group, "rect", "bar", x=left, y=y - 7, width=max(x(values[name]) - left, 1), height=14, rx=2)
        _add(group, "text", "figure", say(values[name]), x=x(values[name]) + 7, y=y + 4)
    return _text_of(svg)


@dataclass(frozen=True, slots=True)
class Point:
    """A mark in a plane; `chosen` for the recommended one."""

    name: str
    x: float
    y: float
    chosen: bool = False


def plane(points: Sequence[Point], x_name: str, y_name: str, say_x: Say, say_y: Say) -> str:
    """Two costs against each other, both logarithmic: the closer to the lower left corner, the better.

    Points that no other one beats in both are filled, and joined by a line.
    """
    top, bottom, left = 30, 262, 62
    exact = any(point.y == 0 for point in points)  # zero is not on a logarithmic axis, so it is drawn below
    x = axis([point.x for point in points], left, WIDTH - _RIGHT, log=True)
    y = axis([point.y for point in points], bottom - 30 if exact else bottom, top, log=True)
    svg = _svg(bottom + 40, role="group")
    if exact:
        _grid(svg, left, bottom, WIDTH - _RIGHT, bottom)
        _add(svg, "text", "tick", "0", x=left - 6, y=bottom + 4, text_anchor="end")
    for value in x.ticks():
        _grid(svg, x(value), top, x(value), bottom)
        _add(svg, "text", "tick", say_x(value), x=x(value), y=bottom + 16, text_anchor="middle")
    for value in y.ticks():
        _grid(svg, left, y(value), WIDTH - _RIGHT, y(value))
        _add(svg, "text", "tick", say_y(value), x=left - 6, y=y(value) + 4, text_anchor="end")
    _add(svg, "text", "axis", x_name, x=WIDTH - _RIGHT, y=bottom + 34, text_anchor="end")
    _add(svg, "text", "axis", y_name, x=4, y=14)
    position = {point.name: (x(point.x), y(point.y) if point.y > 0 else float(bottom)) for point in points}
    front = [point for point in points if not any(_beats(other, point) for other in points)]
    line = sorted((position[point.name] for point in front), key=lambda found: (found[0], -found[1]))
    steps = "".join(f"H{at:.1f}V{height:.1f}" for at, height in line[1:])
    _add(svg, "path", "front", d=f"M{line[0][0]:.1f} {line[0][1]:.1f}{steps}")
    marks = ElementTree.SubElement(svg, "g")
    taken = [(at - 6, height + 4, 12.0) for at, height in position.values()]
    for point in sorted(points, key=lambda each: (not each.chosen, each not in front, position[each.name][1])):
        at, height = position[point.name]
        group = _pointed(marks, point.name, f"{say_x(point.x)}, {say_y(point.y)}")
        _add(group, "circle", "dot" if point in front else "dot behind", cx=at, cy=height, r=5)
        if point.chosen:
            _add(group, "circle", "ring", cx=at, cy=height, r=9)
        _label(group, _short(point.name), at, height, left, taken)
    marks[:] = reversed(marks)  # labeled first, drawn last: the important marks are on top
    return _text_of(svg)


def _beats(one: Point, other: Point) -> bool:
    return (one.x, one.y) != (other.x, other.y) and one.x <= other.x and one.y <= other.y


def curve(points: Sequence[tuple[float, float, str, str]], x_name: str, y_name: str) -> str:
    """Values over steps, each with a name and a description; the last one is marked."""
    top, bottom, left = 30, 150, 62
    x = axis([at for at, *_ in points], left, WIDTH - _RIGHT, log=False)
    y = axis([value for _, value, *_ in points], bottom, top, log=False)
    svg = _svg(bottom + 40, role="group")
    for value in y.ticks(4):
        _grid(svg, left, y(value), WIDTH - _RIGHT, y(value))
        _add(svg, "text", "tick", f"{value:.4g}", x=left - 6, y=y(value) + 4, text_anchor="end")
    for value in x.ticks():
        _add(svg, "text", "tick", f"{value:.6g}", x=x(value), y=bottom + 16, text_anchor="middle")
    _add(svg, "text", "axis", x_name, x=WIDTH - _RIGHT, y=bottom + 34, text_anchor="end")
    _add(svg, "text", "axis", y_name, x=4, y=14)
    _add(svg, "path", "front", d="M" + "L".join(f"{x(at):.1f} {y(value):.1f}" for at, value, *_ in points))
    for at, value, name, words in points:
        _add(_pointed(svg, name, words), "circle", "dot", cx=x(at), cy=y(value), r=4)
    at, value, *_ = points[-1]
    _add(svg, "circle", "ring", cx=x(at), cy=y(value), r=8)
    return _text_of(svg)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _rows(
    names: Mapping[str, Any], x: Axis | None, say: Say, left: float
) -> tuple[ElementTree.Element, dict[str, int]]:
    """A picture with one row a name, ticks of `x` above them; returns the height of each row."""
    top = 20 if x else 4
    svg = _svg(top + _ROW * len(names) + 4)
    for value in x.ticks() if x else ():
        assert x is not None, "it has ticks"
        _grid(svg, x(value), top, x(value), top + _ROW * len(names))
        _add(svg, "text", "tick", say(value), x=x(value), y=12, text_anchor="middle")
    rows = {}
    for index, name in enumerate(names):
        rows[name] = top + _ROW * index + _ROW // 2
        _add(svg, "text", "name", _short(name), x=left - 10, y=rows[name] + 4, text_anchor="end")
    return svg, rows


def _left(names: Mapping[str, Any]) -> float:
    """The x coordinate where the names end."""
    return 16 + _LETTER * max((len(_short(name)) for name in names), default=0)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _label(
    group: ElementTree.Element, text: str, x: float, y: float, left: float, taken: list[tuple[float, float, float]]
) -> None:
    """Label a mark, on the side and at the height where there is no other label yet."""
    width = _LETTER * len(text)
    positions = [(x + side, y + shift) for shift in (4, -10, 18, -22, 30, -34, 42) for side in (12, -12 - width)]
    inside = [position for position in positions if left <= position[0] <= WIDTH - width]
    free = [position for position in inside if not any(_overlap((*position, width), other) for other in taken)]
    at, height = (free or inside or positions)[0]
    taken.append((at, height, width))
    _add(group, "text", "name mark", text, x=at, y=height)


def _overlap(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    return abs(one[1] - other[1]) < 13 and one[0] < other[0] + other[2] and other[0] < one[0] + one[2]


def _svg(height: float, *, role: str = "img") -> ElementTree.Element:
    return ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {height:g}", "role": role})


def _add(parent: ElementTree.Element, tag: str, kind: str, text: str = "", **attributes: float | str) -> None:
    """Add an element of the CSS class `kind`."""
    given = {"class": kind}
    for key, value in attributes.items():
        given[key.replace("_", "-")] = value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
    ElementTree.SubElement(parent, tag, given).text = text or None


def _titled(svg: ElementTree.Element, title: str) -> ElementTree.Element:
    group = ElementTree.SubElement(svg, "g")
    ElementTree.SubElement(group, "title").text = title
    return group


def _pointed(svg: ElementTree.Element, name: str, words: str) -> ElementTree.Element:
    """A group that the keyboard reaches; its words are shown while it has focus or is pointed at."""
    group = _titled(svg, f"{name}: {words}")
    group.attrib |= {"class": "point", "role": "img", "tabindex": "0"}
    tip = f"{_short(name)}: {words}"
    _add(group, "text", "name mark tip", tip, x=WIDTH - _RIGHT, y=14, text_anchor="end", visibility="hidden")
    return group


def _grid(svg: ElementTree.Element, x1: float, y1: float, x2: float, y2: float) -> None:
    _add(svg, "line", "grid", x1=x1, y1=y1, x2=x2, y2=y2)


def _text_of(svg: ElementTree.Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode")
