"""`btm init`: a commented plan to begin with, sized to the texts that are named and to this machine."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from btm_cluster.errors import UserError
from btm_cluster.plan import ReadingPlan, TextPlan
from btm_cluster.terminal.amounts import duration

if TYPE_CHECKING:
    from btm_cluster.driver.sizing import Machine, ModelSize, Sizing

_PLAN = """\
# A plan for one forest. `btm plan FILE` says what it would do and cost, `btm run FILE` does it.
# Relative paths begin at the folder of this file. `btm schema` prints a JSON schema for your editor.
name: my-forest
store: ./forests/my-forest            # a folder, or s3://bucket/prefix
{assumed}
domains:                              # an expert each
{domains}
targets:{targets}

reading:
  development_share: {share:g}             # held out for what is fitted
  test_share: {share:g}                    # held out for what is reported
  bad_documents: refuse               # or skip: leave out, count and report lines that are broken or too long
{chat_template}
tokenizer: {{train: {{vocabulary: {vocabulary}}}}}        # or {{pretrained: name-or-folder}}
model: {model}
                                      # or {{preset: gpt3-125m}}, or {{pretrained: name-or-folder}}, which then is the seed

training:
  block_tokens: {block_tokens}
  updates: {updates}                         # the whole budget: seed updates, then expert updates
  seed_share: 0.75                    # the paper's 0.5 suits larger models; leave it out where the model is pretrained
  blocks_per_domain_update: {blocks}         # an expert's batch; the seed takes this times the number of domains
  learning_rate: {learning_rate:g}
# branching:
#   learning_rate_scale: 2            # the experts' rate over the seed's. Default: the paper's 1, or 10 with LoRA
#   train: lora                       # adapters alone, of a frozen seed; or feed-forward
baselines: [transformer-lm]           # a Transformer-LM of the same compute: was the forest worth it?

merging: {{posterior: calibrated, prior: fitted, development_blocks: 100}}    # posterior: gate learns more; with_seed: true

# expansion:                          # how `btm expand` adds what arrives in the store's inbox
#   accept_if: {{development_perplexity_rise_at_most: 0.01}}    # hold back experts that make the forest worse

cluster:                              # how, not what: changing this changes no result's name
  seed_gpus: {seed_gpus:g}                        # 0 trains on CPU
  gpus_per_expert: {gpus_per_expert:g}                  # 0.25 puts four experts on one GPU
  seed_cpus: {seed_cpus}
  cpus_per_expert: {cpus_per_expert}
  # concurrent_experts: 8
  # price_per_gpu_hour: 2.5
# budget: {{{budget}_hours: 10}}            # once it is spent the run saves and stops; raise it, and it goes on
# tracking: {{wandb: {{project: forests}}}}         # or mlflow; TensorBoard's curves are always in the store's logs/
"""
_EXAMPLE_DOMAINS = """\
  - name: news
    text: ./text/news/*.jsonl.zst     # .jsonl .parquet .txt, plain, .gz, .zst or .bz2; local or s3://; globs and lists
    field: text                       # the field of a row that holds the document
  - name: code
    text: ./text/code/**/*.py         # any other file is a document of its own"""
_EXAMPLE_TARGETS = """                              # evaluated, never trained on: half development, half test text
  - {name: blog, text: ./text/blog.jsonl}"""
_SMALL = "{config: {model_type: gpt2, n_layer: 4, n_embd: 256, n_head: 4}}"
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_LINE = f"""\
  chat_template: {_TEMPLATE_FILE}  # renders messages; leave it out for a pretrained tokenizer that has its own
"""
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""
"""For messages and a tokenizer that is trained here, whose one special token ends what the assistant says.
Between `generation` stands what is learned."""
STARTER_PLAN = _PLAN.format(
    assumed="",
    domains=_EXAMPLE_DOMAINS,
    targets=_EXAMPLE_TARGETS,
    chat_template="",
    share=0.02,
    vocabulary=8192,
    model=_SMALL,
    block_tokens=256,
    updates=600,
    blocks=8,
    learning_rate=2e-3,
    seed_gpus=0,
    gpus_per_expert=0,
    seed_cpus=2,
    cpus_per_expert=1,
    budget="cpu",
)
"""Where no text is named: small enough for a laptop."""


@dataclass(frozen=True)
class NamedTexts:
    """Texts for a plan, as they are found from the current folder."""

    domains: Sequence[TextPlan]
    targets: Sequence[TextPlan] = ()


def write_starter_plan(path: Path, texts: NamedTexts | None = None) -> str:
    """Writes a plan to a new file, for these texts where any are named; returns what was assumed for it.

    Where texts have messages, a chat template is written beside it, unless one is there.

    Raises:
        UserError: the file is there already, or cannot be written.
        TextError: a text that is not there, or of a kind that is not read.
    """
    if path.exists():
        raise UserError(f"{path} already exists", remedy="choose another name")
    plan, assumed = (STARTER_PLAN, "") if texts is None else _sized_plan(path, texts)
    try:
        path.write_text(plan, encoding="utf-8")
        if _TEMPLATE_LINE in plan and not (template := path.parent / _TEMPLATE_FILE).exists():
            template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    except OSError as exc:
        raise UserError(f"cannot write {path}", found=str(exc), remedy="choose another file") from exc
    return assumed


def _sized_plan(path: Path, texts: NamedTexts) -> tuple[str, str]:
    from btm_cluster.driver.sizing import SEED_SHARE, size_for

    _look_into(texts)
    tokens = {text.name: _tokens(text) for text in (*texts.domains, *texts.targets)}
    domains = {text.name: tokens[text.name] for text in texts.domains}
    machine = _this_machine()
    sizing = size_for(domains, sum(tokens[text.name] for text in texts.targets), machine)
    assumed = _assumed(domains, sizing, machine)
    has_messages = any(_messages(text) for text in (*texts.domains, *texts.targets))
    gpus = machine.devices if machine.on_gpus else 0
    shared = min(1.0, int(100 * gpus / len(domains)) / 100) if sizing.size.preset is None else 1.0
    cpus = len(os.sched_getaffinity(0)) if machine.on_gpus else machine.devices
    assert SEED_SHARE == 0.75, "as the template says"
    return _PLAN.format(
        assumed="".join(f"\n# {line}" for line in assumed) + "\n",
        domains="\n".join(_entry(text, path) for text in texts.domains),
        targets=_targets(texts.targets, path),
        chat_template=_TEMPLATE_LINE if has_messages else "",
        share=sizing.held_out_share,
        vocabulary=sizing.vocabulary,
        model=_model(sizing.size),
        block_tokens=sizing.size.block_tokens,
        updates=sizing.updates,
        blocks=sizing.blocks_per_update,
        learning_rate=sizing.size.learning_rate,
        seed_gpus=min(gpus, 1),
        gpus_per_expert=max(0.01, shared) if gpus else 0,
        seed_cpus=cpus,
        cpus_per_expert=max(1, cpus // len(domains)),
        budget="gpu" if gpus else "cpu",
    ), "\n".join(assumed)


def _look_into(texts: NamedTexts) -> None:
    """Refuses what reading would refuse, as far as a first look tells."""
    from btm_cluster.data.first_look import Unread, look_into
    from btm_cluster.data.sources import fingerprint, refuse_unread

    unread = []
    for text in (*texts.domains, *texts.targets):
        refuse_unread(text, fingerprint(text))
        form = (
            {"messages": messages} if (messages := _messages(text)) else {"field": _field(text) or text.field}
        )
        unread.append(Unread(text.model_copy(update=form), ReadingPlan(), text in texts.targets))
    look_into(unread)


def _tokens(text: TextPlan) -> int:
    """About as many as its files hold."""
    from btm_cluster.data.sizes import estimated_tokens
    from btm_cluster.data.sources import fingerprint

    return estimated_tokens(fingerprint(text)["text"])


def _field(text: TextPlan) -> str | None:
    """The field of its rows that seems to hold the text, where that is another than the default."""
    from btm_cluster.data.fields import field_with_text
    from btm_cluster.data.sources import opened_files

    found = field_with_text(next(opened_files(text)))
    return None if found == text.field else found


def _messages(text: TextPlan) -> tuple[str, ...]:
    """The field or fields of its rows that seem to hold messages."""
    from btm_cluster.data.fields import fields_with_messages
    from btm_cluster.data.sources import opened_files

    return fields_with_messages(next(opened_files(text)))


def _this_machine() -> "Machine":
    from btm_cluster.driver.rates import ASSUMED_GPU
    from btm_cluster.driver.sizing import Machine
    from btm_cluster.language_model.utilisation import (
        CPU_UTILISATION,
        GPU_UTILISATION,
        cpu_flops,
        peak_flops,
    )
    from btm_cluster.workers.machine import room_here

    room = room_here(on_gpus=True)
    if room.gpus:
        peak = peak_flops(room.gpu or "") or peak_flops(ASSUMED_GPU)
        assert peak is not None
        return Machine(f"{room.gpus:g} × {room.gpu}", int(room.gpus), GPU_UTILISATION * peak, on_gpus=True)
    cpus = int(room_here(on_gpus=False).cpus or 1)
    return Machine(f"{cpus} CPUs without a GPU", cpus, CPU_UTILISATION * cpu_flops(), on_gpus=False)


def _assumed(domains: dict[str, int], sizing: "Sizing", machine: "Machine") -> list[str]:
    smallest = min(domains, key=lambda name: domains[name])
    sizes = ", ".join(f"{name} ≈{float(f'{tokens:.1e}'):,.0f}" for name, tokens in domains.items())
    return [
        f"Sized by `btm init` for {machine.name}, and for these tokens, by the sizes of the files: {sizes}.",
        f"A model of {sizing.size.parameters / 1e6:,.1f} million parameters; its updates read {smallest} about "
        f"{sizing.passes:.1f} times (over 4, more passes teach little).",
        f"A first run takes about {duration(max(60.0, 3600 * sizing.hours))} here. With more text or time, raise `updates`.",
    ]


def _entry(text: TextPlan, path: Path) -> str:
    files = [_from_plan(pattern, path) for pattern in text.text]
    shown = json.dumps(files[0] if len(files) == 1 else files, ensure_ascii=False)
    is_plain = yaml.safe_load(text.name) == text.name  # YAML takes `no` for false and `2023` for a number
    name = text.name if is_plain else json.dumps(text.name)
    return f"  - {{name: {name}, text: {shown}{_form(text)}}}"


def _form(text: TextPlan) -> str:
    """The options of an entry that say what the rows of its files hold."""
    if messages := _messages(text):
        return f", messages: {json.dumps(messages[0] if len(messages) == 1 else messages)}"
    field = _field(text)
    return "" if field is None else f", field: {json.dumps(field)}"


def _targets(texts: Sequence[TextPlan], path: Path) -> str:
    if not texts:
        return " []                           # texts that are evaluated, never trained on"
    entries = "\n".join(_entry(text, path) for text in texts)
    return f"                              # evaluated, never trained on: half development, half test text\n{entries}"


def _from_plan(pattern: str, path: Path) -> str:
    """A pattern of the current folder, from the folder of the plan."""
    if "://" in pattern or pattern.startswith(("/", "~")):
        return pattern
    return os.path.relpath(os.path.join(os.getcwd(), pattern), os.path.realpath(path.parent))


def _model(size: "ModelSize") -> str:
    if size.preset is not None:
        return f"{{preset: {size.preset}}}"
    shape = f"n_layer: {size.layers}, n_embd: {size.width}, n_head: {size.heads}"
    return f"{{config: {{model_type: gpt2, {shape}}}}}"
