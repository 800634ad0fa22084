"""Rules between the fields of a plan's sections.

Rules read a section as it was written, so that they are checked, and their problems shown, beside those of
single fields. They know what fields mean and nothing of how their problems are worded to the user
(`problems.py`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from btm_cluster.plan.broken_rules import (
    Broken,
    Given,
    entries_of,
    exactly_one,
    field_of,
    is_given,
    numbers_of,
    section_of,
)
from btm_cluster.plan.text_rules import held_out_texts, same_texts
from btm_cluster.plan.trains import ALL_LINEAR

LEAST_GPU_SHARE = 0.0001


def tokenizer_rules(given: Given) -> Iterator[Broken]:
    """One source."""
    yield from exactly_one(given, ("train", "pretrained"), "add `train: {vocabulary: 8192}`")
    if given.get("first_token") is not None and given.get("pretrained") is None:
        expected = (
            "a pretrained tokenizer: one that is trained here reads every block after its end-of-text token"
        )
        yield Broken("first_token", repr(given["first_token"]), expected, "leave it out")


def model_rules(given: Given) -> Iterator[Broken]:
    """One source; and a configuration says of what type it is."""
    yield from exactly_one(given, ("preset", "config", "pretrained"), "add `preset: gpt3-125m`")
    config = given.get("config")
    if isinstance(config, Mapping) and not isinstance(config.get("model_type"), str):
        found = repr(config["model_type"]) if "model_type" in config else "no `model_type`"
        yield Broken("config", found, "a `model_type`, such as gpt2 or llama", "add `model_type: gpt2`")


def training_rules(given: Given) -> Iterator[Broken]:
    """Something is left of the updates for the experts, and a seed that gets a share gets an update."""
    numbers = numbers_of(given, updates=80_000, seed_share=0.5)
    if numbers is None or not (1 <= numbers[0] < 1e15 and 0 <= numbers[1] < 1):
        return
    seed = round(numbers[1] * numbers[0])
    found = f"the seed takes {seed} of {numbers[0]:g} updates"
    if seed >= numbers[0]:
        yield Broken(
            "", found, "at least one update for the experts", "raise `updates` or lower `seed_share`"
        )
    if not seed and given.get("seed_share"):
        yield Broken(
            "seed_share", found, "a share that comes to an update, or 0", "raise `updates` or `seed_share`"
        )


def muon_rules(given: Given) -> Iterator[Broken]:
    """Muon's step is taken over whole matrices: of the plan's model, and of a study's sizes."""
    if field_of(given.get("cluster"), "sharding") != "full":
        return
    sizes = entries_of(field_of(given.get("study"), "sizes"))
    trained = {"": given} | {f"study.sizes[{number}].": size for number, size in enumerate(sizes)}
    for at, one in trained.items():
        if field_of(field_of(one, "training"), "optimizer") == "muon":
            expected = "`adamw`, since a sharded model has no whole matrix on any GPU"
            remedy = "take `sharding: none` or `auto`, or `optimizer: adamw`"
            yield Broken(f"{at}training.optimizer", "'muon'", expected, remedy)


def lora_rules(given: Given) -> Iterator[Broken]:
    """All linear layers are all: no name stands beside them."""
    modules = entries_of(given.get("modules"))
    if others := [name for name in modules if ALL_LINEAR in modules and name != ALL_LINEAR]:
        found = f"{ALL_LINEAR!r} and {', '.join(map(repr, others))}"
        yield Broken("modules", found, f"names of layers, or {ALL_LINEAR!r} alone", "keep one or the other")


def branching_rules(given: Given) -> Iterator[Broken]:
    """An adapter is described where one is trained."""
    train = given.get("train", "all")
    if is_given(given.get("lora")) and train in ("all", "feed-forward"):
        expected = f"nothing, since experts train {train}"
        yield Broken("lora", "an adapter", expected, "leave it out, or write `train: lora`")


def merging_rules(given: Given) -> Iterator[Broken]:
    """A gate learns what a prior says, of all experts; and a temperature needs clusters."""
    if given.get("posterior") == "gate":
        for name, right in (("prior", "fitted"), ("top_k", None)):
            if given.get(name, right) != right:
                remedy = f"leave `{name}` out, or choose another posterior"
                yield Broken(name, repr(given[name]), "nothing, since a gate has no prior", remedy)
    if given.get("cluster_temperature", 0.1) != 0.1 and not is_given(given.get("clusters")):
        found, expected = repr(given["cluster_temperature"]), "nothing, since no cluster model is named"
        yield Broken("cluster_temperature", found, expected, "leave it out, or name the model in `clusters`")


def cluster_rules(given: Given) -> Iterator[Broken]:
    """Groups of several GPUs have whole ones; and only such a group is sharded."""
    asked = numbers_of(given, seed_gpus=0, gpus_per_expert=0)
    if given.get("sharding") == "full" and asked and max(asked) <= 1:
        expected = "a group of several GPUs, over which a model can be spread"
        remedy = "raise `seed_gpus` or `gpus_per_expert`, or leave it out"
        yield Broken("sharding", "'full'", expected, remedy)
    for name in ("seed_gpus", "gpus_per_expert"):
        gpus = numbers_of(given, **{name: 0})
        if gpus and gpus[0] > 1 and gpus[0] % 1:
            found, remedy = f"{gpus[0]:g}", "round it, or give a fraction below 1 to share a GPU"
            yield Broken(name, found, "a whole number above 1: a group's GPUs are whole", remedy)
        if gpus and 0 < gpus[0] < LEAST_GPU_SHARE:
            expected = f"0, or at least {LEAST_GPU_SHARE:g}, the least that Ray divides a GPU into"
            yield Broken(name, f"{gpus[0]:g}", expected, "raise it, or give 0 to train on CPU")


def plan_rules(given: Given) -> Iterator[Broken]:
    """Texts differ in name and in what they are; what is pretrained fits together; baselines stand once."""
    texts = [text for part in ("domains", "targets") for text in entries_of(given.get(part))]
    names = Counter(name for text in texts if isinstance(name := field_of(text, "name"), str))
    for name, count in names.items():
        if count > 1:
            yield Broken(
                "domains, targets",
                f"the name {name!r} {count} times",
                "every name once",
                "rename all but one",
            )
    yield from same_texts(texts)
    yield from held_out_texts(given)
    baselines = Counter(map(str, entries_of(given.get("baselines"))))
    for name, count in baselines.items():
        if count > 1:
            yield Broken("baselines", f"{name!r} {count} times", "every baseline once", "write it once")
    yield from _idle_gpus(given)
    yield from _without_effect(given)
    yield from muon_rules(given)
    model, tokenizer = given.get("model"), given.get("tokenizer")
    if "demix" in baselines and is_given(field_of(model, "pretrained")):
        found, expected = (
            "demix beside a pretrained model",
            "DEMix only where the model is trained from the start",
        )
        yield Broken("baselines", found, expected, "leave `demix` out, or give `model: {config: …}`")
    if is_given(field_of(model, "pretrained")) and is_given(field_of(tokenizer, "train")):
        found, expected = (
            "a pretrained model and a new tokenizer",
            "the tokenizer that the model was trained with",
        )
        yield Broken(
            "tokenizer",
            found,
            expected,
            f"write `tokenizer: {{pretrained: {field_of(model, 'pretrained')}}}`",
        )


def _without_effect(given: Given) -> Iterator[Broken]:
    """Sections that are written for something that the plan does not have."""
    merging = section_of(given, "merging")
    posterior, window = merging.get("posterior", "calibrated"), merging.get("window_tokens", 32)
    # A study measures every posterior.
    if window != 32 and posterior != "window" and given.get("study") is None:
        expected = f"nothing, since the posterior is `{posterior}`"
        yield Broken(
            "merging.window_tokens", repr(window), expected, "leave it out, or say `posterior: window`"
        )
    optimizer = field_of(given.get("branching"), "optimizer")
    if optimizer == "keep" and is_given(field_of(given.get("model"), "pretrained")):
        expected = "nothing, since a pretrained model comes without Adam moments"
        yield Broken("branching.optimizer", "'keep'", expected, "leave it out: they start anew")


def _idle_gpus(given: Given) -> Iterator[Broken]:
    """Every worker of a group has a block of each update."""
    blocks = numbers_of(section_of(given, "training"), blocks_per_domain_update=128)
    gpus = numbers_of(section_of(given, "cluster"), seed_gpus=0, gpus_per_expert=0)
    if blocks is None or gpus is None:
        return
    texts = {"seed_gpus": len(entries_of(given.get("domains"))), "gpus_per_expert": 1}
    for (name, count), asked in zip(texts.items(), gpus, strict=True):
        most = count * blocks[0]
        if asked > max(1, most):
            expected = f"at most {most:g}, the blocks of an update: a GPU without one has nothing to do"
            yield Broken(
                f"cluster.{name}",
                f"{asked:g}",
                expected,
                "lower it, or raise training.blocks_per_domain_update",
            )


def size_rules(given: Given) -> Iterator[Broken]:
    """A study trains every model itself."""
    if is_given(field_of(given.get("model"), "pretrained")):
        yield Broken(
            "model",
            "`pretrained`",
            "`preset` or `config`",
            "a study grows its own seeds: give the model's shape",
        )
    random_seed = field_of(given.get("training"), "random_seed")
    if random_seed:
        expected = "nothing, since a study repeats each size with `study.random_seeds`"
        yield Broken(
            "training.random_seed",
            repr(random_seed),
            expected,
            "leave it out, and give it in `study.random_seeds`",
        )


def growth_rules(given: Given) -> Iterator[Broken]:
    """No way to start is measured twice."""
    yield from _each_once({name: entries_of(given.get(name)) for name in ("starts", "remove")})


def _each_once(lists: Mapping[str, list[Any]]) -> Iterator[Broken]:
    for what, values in lists.items():
        for value, count in Counter(map(str, values)).items():
            if count > 1:
                yield Broken(what, f"{value} {count} times", "each once", "write it once")


def study_rules(given: Given) -> Iterator[Broken]:
    """Nothing is trained twice under two names, and one way chooses the recipe."""
    if is_given(given.get("search")) and is_given(given.get("trials")):
        yield Broken("search", "`search` and `trials`", "one of them", "leave out the other")
    trials = [
        dict(trial) for trial in entries_of(given.get("trials")) if isinstance(trial, Mapping | BaseModel)
    ]
    names = ("random_seeds", "seed_shares", "learning_rate_scales", "systems")
    yield from _each_once(
        {
            "sizes": [field_of(size, "name") for size in entries_of(given.get("sizes"))],
            **{name: entries_of(given.get(name)) for name in names},
            "trials": trials,
        }
    )
