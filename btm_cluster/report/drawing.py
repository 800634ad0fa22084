"""SVG drawings: elements, scales and the numbers on axes.

Colours are classes of `templates/figures.css`, so that a drawing follows the page into dark mode and print.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

NAMESPACE = "http://www.w3.org/2000/svg"
CHARACTER = 7.0
"""Width of a character of 12 pixels in a wide font, in pixels."""
NARROW = 370
"""Pixels: a drawing that fits a phone is drawn larger on a wide page, where it stands alone."""
MINUTES, HOURS = 120, 2 * 3600
"""Seconds from which on minutes or hours are said."""
_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Drawing:
    """An SVG of a size in pixels, with a title and a description."""

    def __init__(self, width: float, height: float, title: str, description: str) -> None:
        size = {"viewBox": f"0 0 {_number(width)} {_number(height)}", "width": _number(width)}
        css = {"class": "narrow"} if width <= NARROW else {}
        self._root = Element(
            "svg", {"xmlns": NAMESPACE, **size, "height": _number(height), "role": "img", **css}
        )
        self.add("title", visible(title))
        self.add("desc", visible(description))

    def add(self, tag: str, content: str | None = None, **attributes: str | float) -> Element:
        """Adds an element. `css` is its class; other names have `-` where they have `_` here."""
        named = {
            "class" if name == "css" else name.replace("_", "-"): value
            if isinstance(value, str)
            else _number(value)
            for name, value in attributes.items()
            if value != ""
        }
        element = SubElement(self._root, tag, named)
        element.text = content
        return element

    def line(self, start: tuple[float, float], end: tuple[float, float], css: str) -> None:
        """A straight line."""
        self.add("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], css=css)

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start") -> Element:
        """Text whose baseline is at y."""
        return self.add("text", visible(text), x=x, y=y, css=css, text_anchor=anchor)

    def rectangle(self, x: float, y: float, width: float, height: float, css: str, tip: str = "") -> None:
        """A rectangle, with a label that shows where the pointer rests on it."""
        element = self.add("rect", x=x, y=y, width=width, height=height, css=css)
        if tip:
            SubElement(element, "title").text = visible(tip)

    def dot(self, x: float, y: float, radius: float, css: str) -> None:
        """A circle."""
        self.add("circle", cx=x, cy=y, r=radius, css=css)

    def svg(self) -> str:
        """The drawing as text."""
        return tostring(self._root, encoding="unicode")


@dataclass(frozen=True)
class Scale:
    """Values on a line of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most so many."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) < most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def time_ticks(seconds: float, most: int) -> list[tuple[float, str]]:
    """Seconds from 0 on that are round in the unit in which they are said, and how."""
    size, unit = (3600.0, "h") if seconds >= HOURS else (60.0, "min") if seconds >= MINUTES else (1.0, "s")
    return [(size * tick, f"{tick:g} {unit}") for tick in ticks(0.0, seconds / size, most)]


def tick_labels(numbers: Sequence[float]) -> list[str]:
    """The numbers of an axis with as many digits as tell them apart."""
    short = [compact(number) for number in numbers]
    if len(numbers) < 2 or (max(map(abs, numbers)) >= 1000 and len(set(short)) == len(short)):
        return short
    digits = max(0, -math.floor(math.log10(numbers[1] - numbers[0]) + 1e-9))
    if digits > 4:
        return [f"{number:.1e}".replace("e-0", "e-") if number else "0" for number in numbers]
    return [f"{number:.{digits}f}" for number in numbers]


def shorten(text: str, most: int) -> str:
    """At most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def width_of(texts: Sequence[str]) -> float:
    """About the pixels that the longest takes, in the size of a figure's text."""
    return CHARACTER * max(map(len, texts), default=0)


def visible(text: str) -> str:
    """Without characters that XML cannot have."""
    return _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def compact(value: float) -> str:
    """A number on an axis: 12,000,000 is 12M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A difference on an axis, with its sign."""
    return f"{100 * value:+.3g} %".replace("-", "−") if value else "0 %"


def share_text(share: float, digits: int = 0) -> str:
    """A share in a sentence or a table."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < MINUTES:
        return f"{seconds:.3g} s"
    if seconds < HOURS:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"


Format = Callable[[float], str]
"""A number as a figure says it."""


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
