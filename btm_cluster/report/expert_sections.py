"""Experts on texts: perplexity and posterior as heat maps, documents coloured by expert, and what each is worth."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

from btm_cluster.report.bars import draw_bars
from btm_cluster.report.content import (
    COLOURS,
    Block,
    Excerpt,
    Figure,
    Key,
    Paragraph,
    Section,
    Table,
    Token,
    not_measured,
)
from btm_cluster.report.drawing import percent, share_text
from btm_cluster.report.heat_map import draw_heat_map
from btm_cluster.report.line_chart import Line, draw_lines
from btm_cluster.report.measured import Piece, TextParts, tops_of

OTHERS = COLOURS - 1
"""The colour of experts that have none of their own."""
HEAT = ("experts", "Experts on texts")
TOKENS = ("tokens", "The expert of each token")
WORTH = ("worth", "What each expert is worth")
MOST_UNFOLDED = 12
"""Excerpts that are shown at once; more are folded under their names."""
AT_LEAST = 1.01
"""A ratio of perplexities that is drawn as a difference, whatever the others are."""


def colours_of(experts: Sequence[str]) -> dict[str, int]:
    """A colour for each expert, where there are enough; else none has its own."""
    return {name: number if len(experts) < COLOURS else OTHERS for number, name in enumerate(experts)}


def heat_section(texts: Sequence[TextParts], experts: Sequence[str], why_not: str) -> Section:
    """Perplexity of each expert on each text, and its mean weight in the ensemble."""
    if not texts:
        return not_measured(*HEAT, why_not)
    # Domains in the experts' order, so that a domain and its expert meet on the diagonal.
    texts = sorted(texts, key=lambda text: [*experts, text.name].index(text.name))
    names = [_name(text) for text in texts]
    blocks: list[Block] = [
        Paragraph(f"Texts are rows, experts are columns.{_looked_at(texts)}", is_note=True),
        _perplexity_map(texts, names, experts),
        _posterior_map(texts, names, experts),
    ]
    return Section(*HEAT, blocks)


def _perplexity_map(texts: Sequence[TextParts], names: Sequence[str], experts: Sequence[str]) -> Figure:
    values = [[text.seed, *text.parts.alone] for text in texts]
    span = math.log(max(AT_LEAST, *(max(row) / min(row) for row in values)))
    shades = [[1 - math.log(value / min(row)) / span for value in row] for row in values]
    cells = [[f"{value:.1f}" for value in row] for row in values]
    caption = (
        "Test perplexity of each expert alone. The stronger the colour, the nearer to the best on that text"
    )
    columns = ["seed", *experts]
    svg = draw_heat_map("Perplexity of experts on texts", caption + ".", names, columns, shades, cells)
    table = Table("test perplexity by text and expert", ["text", *columns], _rows(names, cells))
    return Figure(svg, caption + ".", table)


def _posterior_map(texts: Sequence[TextParts], names: Sequence[str], experts: Sequence[str]) -> Figure:
    values = [text.parts.weights for text in texts]
    cells = [[f"{100 * weight:.0f}" for weight in row] for row in values]
    caption = "Posterior: the expert’s mean weight in the calibrated ensemble, in %"
    svg = draw_heat_map("Posterior of experts on texts", caption + ".", names, experts, values, cells)
    table = Table("mean posterior in %, by text and expert", ["text", *experts], _rows(names, cells))
    return Figure(svg, caption + ".", table)


def _rows(names: Sequence[str], cells: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[name, *row] for name, row in zip(names, cells, strict=True)]


def _name(text: TextParts) -> str:
    return f"{text.name} (target)" if text.is_target else text.name


def _looked_at(texts: Sequence[TextParts]) -> str:
    partial = [text for text in texts if not text.is_whole]
    if not partial:
        return ""
    tokens = min(text.parts.tokens for text in partial)
    return f" Of long test texts the first {tokens:,} tokens or more in hash order are looked at, which is a sample."


def excerpts_section(texts: Sequence[TextParts], experts: Sequence[str], why_not: str) -> Section:
    """A piece of a test document of each text."""
    if not texts:
        return not_measured(*TOKENS, why_not)
    told = (
        "A piece of a test document of each text. A token has the colour and the underline of the expert from "
        "which most of its probability came, by the calibrated posterior; the stronger the colour, the more of it."
    )
    is_folded = len(texts) > MOST_UNFOLDED
    excerpts = [_excerpt(text, experts, is_folded) for text in texts if text.excerpt]
    return Section(*TOKENS, [Paragraph(told), *excerpts])


def _excerpt(text: TextParts, experts: Sequence[str], is_folded: bool) -> Excerpt:
    counts = Counter(piece.expert for piece in text.excerpt)
    colours = _local_colours(counts, len(experts))
    tokens = [
        Token(
            piece.text,
            f"{experts[piece.expert]} {share_text(piece.share)}",
            colours[piece.expert],
            strength(piece.share),
        )
        for piece in text.excerpt
        if piece.text
    ]
    keys = [Key(experts[one], colours[one]) for one, _ in counts.most_common() if colours[one] != OTHERS]
    if any(colour == OTHERS for colour in colours.values()):
        keys.append(Key("other experts", OTHERS))
    rows = [
        ["".join(piece.text for piece in run), experts[one], str(len(run)), share_text(_mean_share(run))]
        for one, run in ((one, list(run)) for one, run in groupby(text.excerpt, lambda piece: piece.expert))
    ]
    table = Table(f"stretches of {text.name}", ["text", "expert", "tokens", "mean share"], rows)
    return Excerpt(_name(text), tokens, table, keys, is_folded)


def _local_colours(counts: Counter[int], experts: int) -> Mapping[int, int]:
    """The page's colours of few experts; of many, the busiest of this excerpt have one."""
    if experts < COLOURS:
        return {one: one for one in counts}
    ranks = {one: rank for rank, (one, _) in enumerate(counts.most_common())}
    return {one: min(rank, OTHERS) for one, rank in ranks.items()}


def strength(share: float) -> int:
    """How strongly a token is coloured: less than half, most, or almost all of it was one expert's."""
    return 1 + (share >= 0.5) + (share >= 0.8)


def _mean_share(run: Sequence[Piece]) -> float:
    return sum(piece.share for piece in run) / len(run)


def worth_section(texts: Sequence[TextParts], experts: Sequence[str], why_not: str) -> Section:
    """How much perplexity rises without an expert, and how few of them would do."""
    if not texts:
        return not_measured(*WORTH, why_not)
    if len(experts) < 2:
        return not_measured(*WORTH, "A forest of one expert has none to leave out.")
    rises = {
        expert: [text.parts.without[number] / text.parts.perplexity - 1 for text in texts]
        for number, expert in enumerate(experts)
    }
    means = sorted(((sum(rise) / len(rise), expert) for expert, rise in rises.items()), reverse=True)
    bars = [(expert, mean) for mean, expert in means]
    caption = "Rise of the calibrated ensemble’s test perplexity where an expert is left out: mean over texts"
    numbers = {expert: number for number, expert in enumerate(experts)}
    weights = [sum(text.parts.weights[numbers[expert]] for text in texts) / len(texts) for _, expert in means]
    table = Table(
        "rise of perplexity without an expert, by text",
        ["expert", "mean rise", "mean posterior", *(_name(text) for text in texts)],
        [
            [
                expert,
                percent(round(mean, 4)),
                share_text(weight, 1),
                *(percent(round(rise, 4)) for rise in rises[expert]),
            ]
            for (mean, expert), weight in zip(means, weights, strict=True)
        ],
    )
    svg = draw_bars("What each expert is worth", bars, lambda value: percent(round(value, 4)))
    return Section(*WORTH, [Figure(svg, caption + ".", table), _top_k(texts, len(experts))])


def _top_k(texts: Sequence[TextParts], experts: int) -> Figure:
    tops = tops_of(experts)
    points = [
        (float(k), sum(text.parts.of_top[number] for text in texts) / len(texts))
        for number, k in enumerate(tops)
    ]
    caption = "Perplexity of the experts with the largest prior alone, of each text: mean over texts"
    svg = draw_lines(
        "How few experts would do", [Line("calibrated", points, 0)], ("experts kept", "perplexity")
    )
    rows = [[f"{k:.0f}", f"{value:.2f}"] for k, value in points]
    return Figure(svg, caption + ".", Table("perplexity by experts kept", ["experts", "perplexity"], rows))
