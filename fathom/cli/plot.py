"""A small SVG writer: line charts with logarithmic axes, side by side, labels at the ends of the lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import log

WIDTH, HEIGHT = 600, 400  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 84, 170, 64, 48  # margins of a panel; the right one holds the labels
LINE_GAP = 32  # the least distance of two labels, which are two lines high

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a panel: its points, its colour, and two lines of label."""

    points: Sequence[Point]
    colour: str
    label: str
    detail: str


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: its ends, and the values that get a grid line and a text."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def at(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        return log(value / self.low) / log(self.high / self.low)


@dataclass(frozen=True)
class Panel:
    """One chart."""

    title: str
    note: str
    x: Axis
    y: Axis
    x_name: str
    curves: Sequence[Curve]


def render(panels: Sequence[Panel], description: str) -> str:
    """The panels from left to right, as one SVG document with a light background."""
    width = WIDTH * len(panels)
    body = "\n".join(_panel(panel, WIDTH * i) for i, panel in enumerate(panels))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'role="img" font-family="Helvetica, Arial, sans-serif" font-size="13">'
    )
    return f"{head}\n<title>{escape(description)}</title>\n{_box(0, 0, width, HEIGHT)}\n{body}\n</svg>\n"


def _panel(panel: Panel, left: float) -> str:
    bottom, right = HEIGHT - BOTTOM, left + WIDTH - RIGHT

    def across(value: float) -> float:
        return left + LEFT + panel.x.at(value) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return bottom - panel.y.at(value) * (HEIGHT - TOP - BOTTOM)

    parts = [
        _text(left + LEFT, 24, panel.title, size=16, weight="bold"),
        _text(left + LEFT, 44, panel.note, colour="#57606a"),
        *(_line(left + LEFT, up(v), right, up(v)) for v, _ in panel.y.ticks),
        *(_line(across(v), TOP, across(v), bottom) for v, _ in panel.x.ticks),
        *(_text(left + LEFT - 8, up(v) + 4, name, anchor="end") for v, name in panel.y.ticks),
        *(_text(across(v), bottom + 18, name, anchor="middle") for v, name in panel.x.ticks),
        _text((left + LEFT + right) / 2, bottom + 38, panel.x_name, anchor="middle", colour="#57606a"),
        *(_curve(curve, across, up) for curve in panel.curves),
        *_labels(panel.curves, right + 8, up),
    ]
    return "\n".join(parts)


def _curve(curve: Curve, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve.points)
    return f'<polyline points="{points}" fill="none" stroke="{curve.colour}" stroke-width="2.5"/>'


def _labels(curves: Sequence[Curve], x: float, up: Callable[[float], float]) -> list[str]:
    """Each label at the height of its line's end, pushed down where it would touch the one above."""
    out, lowest = [], float("-inf")
    for curve in sorted(curves, key=lambda c: -c.points[-1][1]):
        lowest = y = max(up(curve.points[-1][1]), lowest + LINE_GAP)
        out += [_text(x, y, curve.label, colour=curve.colour, weight="bold"), _text(x, y + 14, curve.detail, size=12)]
    return out


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="#ffffff"/>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e4e7eb"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    anchor: str = "start",
    colour: str = "#24292f",
    weight: str = "normal",
) -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
