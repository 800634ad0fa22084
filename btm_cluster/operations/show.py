"""`btm forest show`: a version of the forest, and the token after which its blocks are read."""

from dataclasses import dataclass

from btm_cluster.forest import Forest
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.ledger.versions import version_of


@dataclass(frozen=True)
class Shown:
    """A version, and how the tokenizer spells the first token; None where the store has lost it."""

    forest: Forest
    first_token: str | None


def show(ledger: Ledger, version: int | None = None) -> Shown:
    """A version of the forest; without a number, the newest.

    Raises:
        UserError: there is no forest, or no such version.
    """
    forest = version_of(ledger, version)
    tokenizer = ledger.find(Ref("tokenizer", forest.foundation.tokenizer))
    return Shown(forest, tokenizer.recipe.get("first_token", "end of text") if tokenizer else None)
