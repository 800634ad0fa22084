"""Generated texts at a terminal: the texts, who carried which token, and why each ended."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from btm_cluster.output import printable

if TYPE_CHECKING:
    from btm_cluster.generation import Generated
    from btm_cluster.language_model.prompts import Finish

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
STYLES = (*COLOURS, *(f"bright_{colour}" for colour in COLOURS))
"""Of experts, those that carried most tokens first; then the same underlined."""
ENDINGS: "Mapping[Finish, str]" = {
    "end of text": "the text ended",
    "stop": "a stop string came",
    "tokens": "as many as asked for",
    "block": "the block is full",
}


def as_json(one: "Generated", show_experts: bool) -> dict[str, Any]:
    """Plain values for machines, with each token's expert where that is asked for."""
    return {name: value for name, value in asdict(one).items() if show_experts or name != "pieces"}


def show_generated(found: Sequence["Generated"], show_experts: bool, console: Console) -> None:
    """Prints the texts on standard output, below a line each where there are several, and on standard error how they came about."""
    for number, one in enumerate(found, 1):
        name = f"prompt {number} of {len(found)}"
        if len(found) > 1:
            print(f"--- {name}")
        if show_experts:
            _show_experts(one, console)
        else:
            print(_shown(one.prompt + one.text, console))
        sys.stdout.flush()
        print(f"{name}: {summary(one)}" if len(found) > 1 else summary(one), file=sys.stderr)
        if one.finish == "block":
            print(f"note: {block_note(one)}", file=sys.stderr)


def summary(one: "Generated") -> str:
    """How much was written, why it ended, and whom the forest trusted, the most trusted first."""
    shares = sorted(one.trust.items(), key=lambda share: -share[1])
    trusted = "; trusted " + ", ".join(f"{domain} {share:.0%}" for domain, share in shares) if one.tokens else ""
    return f"{one.tokens} tokens, {ENDINGS[one.finish]}{trusted}"


def block_note(one: "Generated") -> str:
    """Why a text ends before as many tokens as were asked for."""
    block_tokens = one.prompt_tokens + one.tokens
    return (
        f"the block of {block_tokens} tokens is full: the prompt has {one.prompt_tokens}, and the forest reads no further; "
        "to go on, give the end of the text as a prompt"
    )


def _show_experts(one: "Generated", console: Console) -> None:
    """The text in its experts' colours or, without colours, with a mark where the expert changes; then a legend."""
    carried = Counter(piece.expert for piece in one.pieces)
    order = {expert: number for number, (expert, _) in enumerate(carried.most_common())}
    has_colours = console.color_system is not None and not console.no_color
    if has_colours:
        text = Text(_shown(one.prompt, console))
        for piece in one.pieces:
            text.append(_shown(piece.text, console), _style(order[piece.expert]))
        console.print(text, soft_wrap=True)
    else:
        runs = groupby(one.pieces, key=lambda piece: piece.expert)
        told = (f"[{expert}]{''.join(piece.text for piece in run)}" for expert, run in runs)
        print(_shown(one.prompt + "".join(told), console))
    print()
    for expert, number in order.items():
        share = f" carried {carried[expert]} of {one.tokens} tokens"
        if has_colours:
            console.print(Text(f"■ {expert}", _style(number)).append(share, "default"), soft_wrap=True)
        else:
            print(f"[{expert}]{share}")


def _style(number: int) -> str:
    return STYLES[number % len(STYLES)] + (" underline" if number >= len(STYLES) else "")


def _shown(text: str, console: Console) -> str:
    """Text as it is, but for a terminal, which control characters would steer."""
    return printable(text) if console.is_terminal else text
