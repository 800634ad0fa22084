"""`btm generate` on the command line: prompts from arguments, standard input or a file; then one call, and its texts."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from btm_cluster.commands.driving import Address, InProcess, Json, PlanPath, driving
from btm_cluster.errors import UserError
from btm_cluster.own_modules import check_own_modules
from btm_cluster.plan import read_plan


def generate(
    plan_path: PlanPath,
    prompt: Annotated[
        str | None, typer.Option(help="What to go on from; - reads standard input.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts: one per line, or .jsonl with a field `prompt`.", show_default=False),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--for", help="Text whose fitted prior to mix the experts by.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together reach this.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from so many of the likeliest tokens.", show_default=False)
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens that were there are avoided.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text ends before this string; may be repeated.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Another one, another text.")] = 0,
    show_experts: Annotated[bool, typer.Option(help="Mark each token by the expert that carried it.")] = False,
    json_output: Json = False,
    address: Address = None,
    in_process: InProcess = False,
) -> None:
    """Let the whole forest continue a prompt, and say which experts it trusted."""
    plan = read_plan(plan_path)
    check_own_modules()
    from btm_cluster.display import consoles
    from btm_cluster.display_generation import as_json, show_generated
    from btm_cluster.generation import Continuation, check_generate_call
    from btm_cluster.generation import generate as generate_texts
    from btm_cluster.language_model.sampling import Sampling

    stops = tuple(_in_utf8(os.fsencode(one), "a stop string") for one in stop or ())
    sampling = Sampling(temperature, top_p, seed, top_k, repetition_penalty)
    asked = Continuation(max_new_tokens, sampling, stops)
    check_generate_call(asked)
    texts = _prompts(prompt, prompts)
    with driving(plan, address, in_process, dashboard=False, json_output=json_output) as driver:
        found = generate_texts(plan, target, texts, asked, driver)
    if json_output:
        told = [as_json(one, show_experts) for one in found]
        print(json.dumps(told if prompts else told[0]))
    else:
        show_generated(found, show_experts, consoles(False)[0])


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if file is None:
        given = _standard_input() if prompt == "-" else os.fsencode(prompt or "")
        return [_in_utf8(given, "the prompt")]
    if prompt is not None:
        raise UserError(
            "there are prompts twice", found="--prompt and --prompts", expected="one of them", remedy="leave one out"
        )
    try:
        data = file.read_bytes()
    except OSError as exc:
        raise UserError(f"the prompts in {file} cannot be read", found=exc.strerror or str(exc)) from exc
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
        raise UserError("the prompt cannot be read", found=str(exc), remedy="give it as `--prompt TEXT`") from exc


def _in_utf8(data: bytes, what: str) -> str:
    """As all text is read here, whatever the terminal's own encoding is."""
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise UserError(f"{what} is no UTF-8", found=str(exc), remedy="convert it, such as by iconv") from exc
