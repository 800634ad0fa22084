"""The forest and its texts on a page: lineage over versions, sizes and overlaps, and the plan."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import yaml

from btm_cluster.evaluation.texts import TextReport
from btm_cluster.forest import Forest, difference
from btm_cluster.plan import Plan
from btm_cluster.report.bars import draw_bars
from btm_cluster.report.content import Block, Figure, Listing, Paragraph, Section, Table, not_measured
from btm_cluster.report.drawing import share_text
from btm_cluster.report.heat_map import draw_heat_map
from btm_cluster.report.lineage_graph import LEAST_WEIGHT, MOST_VERSIONS, draw_lineage

LINEAGE = ("lineage", "Lineage of the forest")
TEXTS = ("texts", "Texts")
PLAN = ("plan", "Plan")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def lineage_section(versions: Sequence[Forest], colours: Mapping[str, int]) -> Section:
    """Which experts each version has, and what they branched from."""
    caption = (
        "Versions from left to right, a line for each expert from where it was merged to where it was taken out "
        f"(a ring). Grey lines lead from what it branched from, at a weight of {share_text(LEAST_WEIGHT)} or more."
    )
    if len(versions) > MOST_VERSIONS:
        caption += f" The newest {MOST_VERSIONS} of {len(versions)} versions are drawn."
    rows = [[f"{versions[0].version}", versions[0].reason, str(len(versions[0].experts)), "", ""]]
    for before, after in pairwise(versions):
        changed = difference(before, after)
        removed = ", ".join([*changed.removed, *changed.replaced])
        rows.append(
            [f"{after.version}", after.reason, str(len(after.experts)), ", ".join(changed.added), removed]
        )
    table = Table("versions of the forest", ["version", "reason", "experts", "added", "taken out"], rows)
    svg = draw_lineage("Lineage of the forest", versions, colours)
    return Section(*LINEAGE, [Figure(svg, caption, table), _parents_table(versions[-1])])


def _parents_table(forest: Forest) -> Table:
    names = {expert.identity: expert.domain for expert in forest.experts}
    names[forest.foundation.seed] = "seed"
    rows = []
    for expert in forest.experts:
        parents = sorted(expert.parents, key=lambda parent: -parent.weight)
        told = [
            f"{names.get(parent.identity, parent.identity[:8])} {share_text(parent.weight)}"
            for parent in parents[:8]
        ]
        more = f", and {len(parents) - 8} more" if len(parents) > 8 else ""
        rows.append([expert.domain, ", ".join(told) + more, expert.identity[:12]])
    return Table(
        "Experts of the newest version and what they branched from",
        ["expert", "branched from", "model"],
        rows,
    )


def texts_section(
    texts: Sequence[TextReport], overlaps: Mapping[str, Mapping[str, float]], why_not: str
) -> Section:
    """Sizes of texts, and the share of their test text that stands in training text."""
    if not texts:
        return not_measured(*TEXTS, why_not)
    trained = [(text.name, float(text.tokens.get("train", 0))) for text in texts if text.tokens.get("train")]
    blocks: list[Block] = []
    if trained:
        caption = "Training tokens of each domain."
        blocks.append(Figure(draw_bars("Training tokens by domain", trained), caption, _sizes_table(texts)))
    else:
        blocks.append(_sizes_table(texts))
    skipped = [f"{text.name} {count:,} × {why}" for text in texts for why, count in text.skipped.items()]
    if skipped:
        blocks.append(Paragraph(f"Documents that were left out: {'; '.join(skipped)}."))
    domains = list(dict.fromkeys(domain for row in overlaps.values() for domain in row))
    if domains:
        blocks.append(_overlap_map(texts, domains, overlaps))
    return Section(*TEXTS, blocks)


def _sizes_table(texts: Sequence[TextReport]) -> Table:
    splits = ("train", "development", "test")
    rows = []
    for text in texts:
        tokens = [f"{text.tokens[split]:,}" if split in text.tokens else "–" for split in splits]
        words = f"{text.words['train']:,}" if "train" in text.words else "–"
        seen = f"{text.test_documents_in_training:,} of {text.documents.get('test', 0):,}"
        name = f"{text.name} (target)" if text.is_target else text.name
        rows.append([name, words, *tokens, f"{text.duplicates:,}", seen])
    headings = ["text", "training words", *(f"{split} tokens" for split in splits), "duplicates"]
    return Table("sizes of texts", [*headings, "test documents in training"], rows)


def _overlap_map(
    texts: Sequence[TextReport], domains: Sequence[str], overlaps: Mapping[str, Mapping[str, float]]
) -> Figure:
    names = [text.name for text in texts]
    shares = [[overlaps.get(name, {}).get(domain) for domain in domains] for name in names]
    cells = [["" if share is None else f"{100 * share:.1f}" for share in row] for row in shares]
    caption = "Overlap: share of a text’s test windows of 20 words that also stand in a domain’s training text, in %."
    table = Table(
        "overlap in %, test text by training text",
        ["test text", *domains],
        [[name, *row] for name, row in zip(names, cells, strict=True)],
    )
    svg = draw_heat_map("Overlap of test with training text", caption, names, domains, shares, cells)
    return Figure(svg, caption, table)


def plan_section(plan: Plan) -> Section:
    """The plan as it was written, and with all defaults. Credentials in addresses are left out."""
    if plan.written is None:
        name = "The plan, as plain values in the order of their reference"
        written = _yaml(plan.model_dump(mode="json", exclude_unset=True))
    else:
        name, written = "The plan, as it was written", without_credentials(plan.written)
        name += "" if written == plan.written else ", without the credentials in its addresses"
    whole = Listing("With all defaults", _yaml(plan.model_dump(mode="json")))
    return Section(*PLAN, [Listing(name, written), whole])


def _yaml(fields: Mapping[str, object]) -> str:
    return without_credentials(yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=100))


def without_credentials(text: str) -> str:
    """Text without what stands before the @ of an address."""
    return _CREDENTIALS.sub("…@", text)
