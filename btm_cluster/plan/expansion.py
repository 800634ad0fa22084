"""The part of a plan that says how a living forest takes what has arrived: what
an inbox may hold, what may be merged."""

from typing import Annotated, ClassVar

from pydantic import Field

from btm_cluster.plan import text_rules
from btm_cluster.plan.section import Section
from btm_cluster.plan.values import Messages, Positive, PositiveReal, Real, Text


class InboxPlan(Section):
    """How the inbox of the store is read, and the bounds of what is taken from it:
    whoever can write there is not trusted."""

    rules: ClassVar = text_rules.inbox_rules
    field: Text = "text"
    """Field of a JSON row that holds the document."""
    messages: Messages | None = None
    """Instead of `field`, for chat data: field or fields that hold messages, as those of a text. All deliveries of
    rows have them then."""
    delimiter: Text | None = None
    """Cuts text files into documents; without it, a file is a document."""
    most_domains: Positive = 64
    """Domains taken at once; the others wait for the next time."""
    most_files: Annotated[Positive, Field(le=100_000)] = 10_000
    """Files of one domain. How long a line or document may be is `reading.longest_document_characters`."""
    most_gigabytes: PositiveReal = 50
    """Size of one domain's files together, as they lie there."""
    most_decompressed_gigabytes: PositiveReal = 200
    """The same once decompressed. Reading stops there, whatever the files claim."""


class AcceptancePlan(Section):
    """When an expansion is merged."""

    development_perplexity_rise_at_most: Real
    """Largest relative rise, such as 0.01, of the ensemble's mean perplexity on the development text of the
    forest's domains and the plan's targets. Targets that occur in a new domain's training text are left out.
    Fitted on one half of the blocks, measured on the other, both ways. A gate is replaced by the calibrated
    posterior."""


class ExpansionPlan(Section):
    """How `btm expand` adds domains to a forest."""

    accept_if: AcceptancePlan | None = None
    """Hold back new experts that make the forest worse on what it knew before; without it, all are merged."""
    inbox: InboxPlan = InboxPlan()
    """How `inbox/<name>/` in the store is read."""
