"""The sections of a study's page on what was tried: recipes, and learning rates of experts."""

from collections.abc import Iterator, Mapping, Sequence

from btm_cluster.report.content import Paragraph, Section, Table
from btm_cluster.report.entries import select
from btm_cluster.report.results import Entry, Results


def trials_sections(results: Results) -> Iterator[Section]:
    """The trials of a study, if there were any."""
    columns = {
        "learning_rate": "learning rate",
        "updates": "updates",
        "blocks_per_domain_update": "number of blocks of a domain per update",
    }
    yield from _tried_section(
        (
            "recipes",
            "Recipes",
            "Tried on the Transformer-LM alone; all systems were trained by the one in bold.",
        ),
        "learning_rate",
        columns,
        "perplexity on the domains' development text",
        results.trials,
    )
    told = (
        "A scale is the experts' learning rate over the seed's at the same update. Scales are tried on each forest "
        "alone, and its experts have the one in bold. Experts on random splits have the first forest's."
    )
    yield from _tried_section(
        ("rates", "Experts' learning rates", told),
        "learning_rate_scale",
        {"learning_rate_scale": "scale"},
        "perplexity of the ensemble on the domains' development text",
        results.trials,
    )


def _tried_section(
    named: tuple[str, str, str],
    tried: str,
    columns: Mapping[str, str],
    measured: str,
    trials: Sequence[Entry],
) -> Iterator[Section]:
    """The trials of one thing, if there are any: what each column is called and what they were measured by."""
    identifier, heading, opening = named
    trials = [trial for trial in trials if tried in trial]
    if not trials:
        return
    rows = [
        [
            _group(trial),
            *(_number(trial[name]) for name in columns),
            _outcome(trial),
        ]
        for trial in trials
    ]
    strong = frozenset(number for number, trial in enumerate(trials) if trial["chosen"])
    table = Table(heading, ["size", *columns.values(), measured], rows, strong)
    edges = [
        Paragraph(edge)
        for name, setting in columns.items()
        if name != "updates"  # which follow from the others
        for edge in _edges(trials, name, setting)
    ]
    yield Section(identifier, heading, [Paragraph(opening), table, *edges])


def _outcome(trial: Entry) -> str:
    if trial["development"] is None:
        return "diverged"
    stopped = f", stopped at {trial['share']:.3g} of its updates" if "share" in trial else ""
    return f"{trial['development']:.2f}{stopped}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _edges(trials: Sequence[Entry], name: str, setting: str) -> Iterator[str]:
    """A warning for each group whose chosen value has none tried beyond it: of a
    recipe, the baseline may do better there."""
    for group in dict.fromkeys(map(_group, trials)):
        own = [trial for trial in trials if _group(trial) == group]
        values = {trial[name] for trial in own}
        chosen = {trial[name] for trial in select(own, chosen=True)}
        for edge, side in ((max(values), "highest"), (min(values), "lowest")):
            if len(values) > 1 and edge in chosen:
                yield f"The {side} {setting} tried for {group} is the best: one beyond it may be better still."


def _group(trial: Entry) -> str:
    """The name of those that were tried against each other: of one size, and of experts that train the same. What
    diverged later, without a choice, has its random seed."""
    return ", ".join(
        [
            str(trial["size"]),
            *([trial["experts"]] if "experts" in trial else []),
            *([f"random seed {trial['random_seed']}"] if "random_seed" in trial else []),
        ]
    )
