"""`btm generate`: prompts from arguments, standard input or a file; and its
texts, the experts' weights, why each ended."""

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btm_cluster.errors import UserError
from btm_cluster.session import driving, open_ledger, opened_view
from btm_cluster.terminal.options import (
    Cluster,
    ForestPlan,
    JsonAndProgress,
    NoCluster,
    Store,
    forest_place,
)
from btm_cluster.terminal.output import end_input, printable
from btm_cluster.workers.shadowing import check_shadowing

if TYPE_CHECKING:
    from rich.console import Console

    from btm_cluster.language_model.prompts import Finish
    from btm_cluster.operations.generate import Generated

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
STYLES = (*COLOURS, *(f"bright_{colour}" for colour in COLOURS))
"""Styles of experts, those of most tokens first; then the same underlined."""
ENDINGS: "Mapping[Finish, str]" = {
    "end of text": "the text ended",
    "stop": "a stop string came",
    "tokens": "as many as asked for",
    "block": "the block is full",
}


def generate(
    plan_path: ForestPlan = None,
    store: Store = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Prompt to continue; `-` reads it from standard input.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts: one per line, or .jsonl with a field `prompt`.", show_default=False
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--for", help="Text of the plan whose fitted mixture to use.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the smallest set of tokens with at least this total probability."),
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from this many of the likeliest tokens.", show_default=False)
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that have occurred become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the text before this string; may be repeated.", show_default=False),
    ] = None,
    random_seed: Annotated[
        int, typer.Option(help="Random seed of the draw; the same seed gives the same text.")
    ] = 0,
    show_experts: Annotated[
        bool, typer.Option(help="Mark each token by the expert with the largest share of its probability.")
    ] = False,
    json_output: JsonAndProgress = False,
    address: Cluster = None,
    in_process: NoCluster = False,
) -> None:
    """Let the whole forest continue a prompt, and show the experts' weights.

    With a plan the experts are mixed as it says; with --store alone, by the paper's posterior.
    """
    place = forest_place("generate", plan_path, store)
    if target is not None and place.plan is None:
        raise UserError("--for needs a plan", expected="a plan, by which a text's mixture is fitted")
    check_shadowing()
    stops = tuple(_in_utf8(os.fsencode(one), "a stop string") for one in stop or ())
    texts = _prompts(prompt, prompts)
    with opened_view() as view:
        from btm_cluster.language_model.sampling import Sampling
        from btm_cluster.operations.generate import Continuation, check_generate_call, generate_from_store
        from btm_cluster.operations.generate import generate as generate_texts
        from btm_cluster.terminal.tables import consoles

        sampling = Sampling(temperature, top_p, random_seed, top_k, repetition_penalty)
        asked = Continuation(max_new_tokens, sampling, stops)
        check_generate_call(asked)
        if place.plan is None:
            end_input()
            view.say("generating")
            found = generate_from_store(open_ledger(place.store), texts, asked)
        else:
            with driving(
                view, place.plan, address, in_process or address is None, command="generate"
            ) as driver:
                view.say("generating")
                found = generate_texts(place.plan, target, texts, asked, driver)
    if json_output:
        told = [_as_json(one, show_experts) for one in found]
        print(json.dumps(told if prompts else told[0]))
    else:
        _show_generated(found, show_experts, consoles(False)[0])


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if file is None:
        given = _standard_input() if prompt == "-" else os.fsencode(prompt or "")
        return [_in_utf8(given, "the prompt")]
    if prompt is not None:
        raise UserError(
            "there are prompts twice",
            found="--prompt and --prompts",
            expected="one of them",
            remedy="leave one out",
        )
    try:
        data = file.read_bytes()
    except OSError as exc:
        raise UserError(
            f"the prompts in {file} cannot be read",
            found=exc.strerror or str(exc),
            expected="a file with a prompt on each line, or .jsonl with a field `prompt`",
            remedy="name such a file",
        ) from exc
    lines = _in_utf8(data, f"{file}").removeprefix("\ufeff").split("\n")
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{file} has no prompt", expected="one on each line")
    if file.suffix not in (".jsonl", ".ndjson"):
        return [line for _, line in numbered]
    return [_prompt_of(line, f"{file}:{number}") for number, line in numbered]


def _prompt_of(line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    found = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(found, str):
        raise UserError(f"{where} is no prompt", expected='a JSON object such as {"prompt": "Whereas"}')
    return _in_utf8(found.encode(errors="surrogatepass"), where)


def _standard_input() -> bytes:
    try:
        return sys.stdin.buffer.read()
    except OSError as exc:
        raise UserError(
            "the prompt cannot be read", found=str(exc), remedy="give it as `--prompt TEXT`"
        ) from exc


def _in_utf8(data: bytes, what: str) -> str:
    """As all text is read here, whatever the terminal's own encoding is."""
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise UserError(f"{what} is no UTF-8", found=str(exc), remedy="convert it, such as by iconv") from exc


def _as_json(one: "Generated", show_experts: bool) -> dict[str, Any]:
    """Plain values for machines, with each token's expert where that is asked for."""
    return {name: value for name, value in asdict(one).items() if show_experts or name != "pieces"}


def _show_generated(found: Sequence["Generated"], show_experts: bool, console: "Console") -> None:
    """Prints the texts on standard output, below a line each where there are several,
    and on standard error how they came about."""
    for number, one in enumerate(found, 1):
        name = f"prompt {number} of {len(found)}"
        if len(found) > 1:
            print(f"--- {name}")
        if show_experts:
            _show_experts(one, console)
        else:
            print(_shown(one.prompt + one.text, console))
        sys.stdout.flush()
        print(f"{name}: {_summary(one)}" if len(found) > 1 else _summary(one), file=sys.stderr)
        if one.finish == "block":
            print(f"note: {_block_note(one)}", file=sys.stderr)


def _summary(one: "Generated") -> str:
    """How much was written, why it ended, and the experts' mean weights, the largest first."""
    weights = sorted(one.expert_weights.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{domain} {weight:.0%}" for domain, weight in weights)
    return f"{one.tokens} tokens, {ENDINGS[one.finish]}" + (f"; weights: {listed}" if one.tokens else "")


def _block_note(one: "Generated") -> str:
    """Why a text ends before as many tokens as were asked for."""
    block_tokens = one.prompt_tokens + one.tokens
    return (
        f"the block of {block_tokens} tokens is full: the prompt has {one.prompt_tokens}, and the forest "
        "reads no further; to go on, give the end of the text as a prompt"
    )


def _show_experts(one: "Generated", console: "Console") -> None:
    """The text in its experts' colours or, without colours, with a mark where
    the expert changes; then a legend."""
    from rich.text import Text

    counts = Counter(piece.expert for piece in one.pieces)
    order = {expert: number for number, (expert, _) in enumerate(counts.most_common())}
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
        share = f" has the largest share in {counts[expert]} of {one.tokens} tokens"
        if has_colours:
            console.print(Text(f"■ {expert}", _style(number)).append(share, "default"), soft_wrap=True)
        else:
            print(f"[{expert}]{share}")


def _style(number: int) -> str:
    return STYLES[number % len(STYLES)] + (" underline" if number >= len(STYLES) else "")


def _shown(text: str, console: "Console") -> str:
    """Text as it is, but for a terminal, which control characters would steer."""
    return printable(text) if console.is_terminal else text
