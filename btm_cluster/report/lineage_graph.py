"""The lineage of a forest as a graph: versions from left to right, a line for each expert, and what it branched from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from btm_cluster.forest import Forest
from btm_cluster.report.drawing import Drawing, shorten, width_of

STEP, ROW, TOP = 92, 24, 34
MOST_CHARACTERS = 22
LEAST_WEIGHT = 0.05
"""Weight of a parent that has a line of its own, at least."""
MOST_VERSIONS = 12
"""The newest; earlier ones are in the table."""


@dataclass(frozen=True)
class Life:
    """A model in the forest: first and last version that have it, and what it branched from, by weight."""

    domain: str
    identity: str
    first: int
    last: int
    parents: Mapping[str, float]


def lives_of(versions: Sequence[Forest]) -> list[Life]:
    """Every stretch of versions in which a domain has the same expert, in order of beginning."""
    found: list[Life] = []
    for forest in versions:
        for expert in forest.experts:
            known = next(
                (
                    n
                    for n, life in enumerate(found)
                    if life.identity == expert.identity and life.last == forest.version - 1
                ),
                None,
            )
            if known is None:
                parents = {parent.identity: parent.weight for parent in expert.parents}
                found.append(Life(expert.domain, expert.identity, forest.version, forest.version, parents))
            else:
                old = found[known]
                found[known] = Life(old.domain, old.identity, old.first, forest.version, old.parents)
    return found


def draw_lineage(title: str, versions: Sequence[Forest], colours: Mapping[str, int]) -> str:
    """The seed above, then a row for each stretch; a ring where an expert was taken out."""
    shown = list(versions)[-MOST_VERSIONS:]
    lives = [life for life in lives_of(versions) if life.last >= shown[0].version]
    seed = shown[0].foundation.seed
    left = width_of([shorten(life.domain, MOST_CHARACTERS) for life in lives] + ["seed"]) + 14
    places = {forest.version: left + 16 + STEP * number for number, forest in enumerate(shown)}
    newest = shown[-1].version
    told = f"{len(versions)} versions; {len(shown[-1].experts)} experts in version {newest}."
    identities = list(dict.fromkeys(life.identity for life in lives))  # one that came back has its row again
    height = TOP + ROW * (len(identities) + 1)
    drawing = Drawing(left + STEP * len(shown) + 16, height, title, told)
    for version, x in places.items():
        drawing.text(x, 14, f"version {version}", "small", "middle")
        drawing.line((x, 20), (x, height - 6), "grid")
    heights = {seed: TOP + 0.5 * ROW}
    for number, identity in enumerate(identities, 1):
        heights[identity] = TOP + (number + 0.5) * ROW
    drawing.text(left - 8, heights[seed] + 4, "seed", "", "end")
    drawing.line((places[shown[0].version], heights[seed]), (places[newest], heights[seed]), "line c7")
    drawing.dot(places[shown[0].version], heights[seed], 5, "c7")
    for life in lives:
        _draw_life(drawing, life, places, heights, colours.get(life.domain, 7), newest)
    return drawing.svg()


def _draw_life(
    drawing: Drawing,
    life: Life,
    places: Mapping[int, float],
    heights: Mapping[str, float],
    colour: int,
    newest: int,
) -> None:
    y, first = heights[life.identity], max(life.first, min(places))
    start, end = places[first], places[life.last]
    drawing.text(min(places.values()) - 24, y + 4, shorten(life.domain, MOST_CHARACTERS), "", "end")
    if life.first in places:
        for parent, weight in life.parents.items():
            if parent in heights and weight >= LEAST_WEIGHT:
                bend = start - 0.45 * STEP
                path = f"M{bend:g} {heights[parent]:g}C{start - 8:g} {heights[parent]:g} {bend:g} {y:g} {start:g} {y:g}"
                drawing.add("path", d=path, css="branch", stroke_width=0.8 + 2.2 * weight)
    if life.last < newest:
        drawing.line((start, y), (end + 0.4 * STEP, y), f"line c{colour}")
        drawing.dot(end + 0.4 * STEP, y, 5, f"ring c{colour}")
    else:
        drawing.line((start, y), (end, y), f"line c{colour}")
    for version, x in places.items():
        if life.first <= version <= life.last:
            drawing.dot(x, y, 4.5, f"c{colour}")
