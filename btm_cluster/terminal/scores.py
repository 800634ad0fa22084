"""Scored documents at a terminal: a line for each, and a table of all of them by model."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from btm_cluster.terminal.output import printable
from btm_cluster.terminal.tables import plain_table

if TYPE_CHECKING:
    from btm_cluster.language_model.document_scores import NamedText, Scored, Surprise

_COLUMNS = "{:24} {:>9} {:>11} {:>11} {:>9}  {}"
HEADING = _COLUMNS.format("document", "tokens", "bytes", "perplexity", "bits/byte", "domain")
_LEAST_SHARE = 0.005
"""Smallest share of a domain that is named: what rounds to a percent."""


def as_json(one: "Scored") -> dict[str, Any]:
    """Plain values for machines."""
    return asdict(one) | {"domain": one.domain}


def document_line(text: "NamedText", one: "Scored") -> str:
    """A document under the ensemble, and the domains that it is of."""
    return _COLUMNS.format(
        printable(f"{text.source}:{text.number}"),
        f"{one.tokens:,}",
        f"{one.bytes:,}",
        *_figures(one.ensemble),
        _shares(one),
    )


def total_table(whole: "Scored", documents: int) -> Table:
    """All documents under the ensemble and under each model, the least surprised first."""
    many = f"{documents:,} document{'s' * (documents > 1)}"
    models = sorted(whole.experts.items(), key=lambda model: model[1].perplexity)
    rows = [["ensemble", *_figures(whole.ensemble), ""]]
    rows += [
        [name, *_figures(surprise), f"{whole.posterior[name]:.1%}" if name in whole.posterior else "–"]
        for name, surprise in models
    ]
    posterior = "domain posterior" + (", mean over documents" if documents > 1 else "")
    title = f"{many}, {whole.tokens:,} tokens, {whole.bytes:,} bytes; most likely {whole.domain}"
    return plain_table(title, ["model", "perplexity", "bits per byte", posterior], rows)


def _figures(surprise: "Surprise") -> tuple[str, str]:
    return f"{surprise.perplexity:,.2f}", f"{surprise.bits_per_byte:.4f}"


def _shares(one: "Scored") -> str:
    named = sorted(one.posterior.items(), key=lambda share: -share[1])
    return ", ".join(f"{domain} {share:.0%}" for domain, share in named if share >= _LEAST_SHARE)
