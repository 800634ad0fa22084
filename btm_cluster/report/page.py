"""Renders a page as one HTML file that needs nothing else: style, script and drawings are in it.

Whatever texts and names have is escaped, and the page's own policy lets no other script or style run.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from btm_cluster.report.content import Page
from btm_cluster.report.drawing import visible

TEMPLATES = "templates"


def render(page: Page) -> str:
    """The page as HTML."""
    style, script = style_sheet(), _file("page.js")
    html = (
        _environment()
        .get_template("page.html")
        .render(
            page=page,
            style=Markup(style),
            script=Markup(script),
            style_hash=_hash(style),
            script_hash=_hash(script),
        )
    )
    return visible(html)


def style_sheet() -> str:
    """The style of a page and its figures."""
    return _file("figures.css") + _file("page.css")


def standalone(svg: str) -> str:
    """A drawing as a file of its own, in light and dark, on its own paper: the page that shows it may have another."""
    head, closing, rest = svg.partition(">")
    return f"{head}{closing}<style>{_file('figures.css')}svg {{ background: var(--paper); }}</style>{rest}\n"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("btm_cluster.report", TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["code"] = _with_code
    # Drawings are made by ElementTree, which escapes what they are given.
    environment.filters["svg"] = Markup
    return environment


@cache
def _file(name: str) -> str:
    return files("btm_cluster.report").joinpath(TEMPLATES, name).read_text(encoding="utf-8")


def _with_code(text: str) -> Markup:
    """HTML of a text whose parts between backticks are code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
