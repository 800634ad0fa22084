"""What a forest is used for: `btm merge` writes one averaged model, `btm generate` lets all experts write together."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from btm_cluster.commands.driving import Address, InProcess, Json, PlanPath, driving
from btm_cluster.errors import UserError
from btm_cluster.own_modules import check_own_modules
from btm_cluster.plan import read_plan


def merge(
    plan_path: PlanPath,
    to: Annotated[Path, typer.Option(help="Folder for the Hugging Face model.", show_default=False)],
    weights: Annotated[
        str, typer.Option(help="uniform, argmax, posterior; or searched: greedy, learned.")
    ] = "posterior",
    target: Annotated[str | None, typer.Option("--for", help="Text to merge for; uniform needs none.")] = None,
    json_output: Json = False,
    address: Address = None,
    in_process: InProcess = False,
) -> None:
    """Average the experts into one model and write it as a Hugging Face folder."""
    plan = read_plan(plan_path)
    check_own_modules()
    from btm_cluster.merged_model import check_merge_call, write_merged_model

    check_merge_call(plan, weights, target, to)
    with driving(plan, address, in_process, dashboard=False, json_output=json_output) as driver:
        parts = write_merged_model(plan, weights, target, to, driver)
    told = f"wrote {to}: {', '.join(f'{weight:.3g} {name}' for name, weight in parts.items())}"
    print(json.dumps({"folder": str(to), "weights": parts}, indent=1) if json_output else told)


def generate(
    plan_path: PlanPath,
    prompt: Annotated[str, typer.Option(help="What to go on from; - reads standard input.")] = "",
    target: Annotated[str | None, typer.Option("--for", help="Text whose fitted prior to mix the experts by.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together reach this.")] = 1.0,
    random_seed: Annotated[int, typer.Option(help="Another one, another text.")] = 0,
    json_output: Json = False,
    address: Address = None,
    in_process: InProcess = False,
) -> None:
    """Let the whole forest continue a prompt, and say which experts it trusted."""
    plan = read_plan(plan_path)
    check_own_modules()
    from btm_cluster.generation import check_generate_call
    from btm_cluster.generation import generate as generate_text
    from btm_cluster.language_model.sampling import Sampling

    sampling = Sampling(temperature, top_p, random_seed)
    check_generate_call(tokens, sampling)
    prompt = _in_utf8(_standard_input() if prompt == "-" else os.fsencode(prompt))
    with driving(plan, address, in_process, dashboard=False, json_output=json_output) as driver:
        found = generate_text(plan, target, prompt, tokens, sampling, driver)
    print(json.dumps(asdict(found)) if json_output else prompt + found.text)
    print(found.trust_line, file=sys.stderr)


def _standard_input() -> bytes:
    try:
        return sys.stdin.buffer.read()
    except OSError as exc:
        raise UserError("the prompt cannot be read", found=str(exc), remedy="give it as `--prompt TEXT`") from exc


def _in_utf8(prompt: bytes) -> str:
    """As all text is read here, whatever the terminal's own encoding is."""
    try:
        return prompt.decode()
    except UnicodeDecodeError as exc:
        raise UserError("the prompt is no UTF-8", found=str(exc), remedy="convert it, such as by iconv") from exc
