"""Formulas of the documentation's site as MathML, rendered when it is built.

`zensical.toml` names `format_math` for blocks of ```math, so that pages need no script and no network.
"""

from typing import Any

from latex2mathml.converter import convert


def format_math(source: str, *_: Any, **__: Any) -> str:
    """A block of LaTeX as MathML."""
    return f'<div class="math" style="margin: 1em 0">{convert(source, display="block")}</div>'
