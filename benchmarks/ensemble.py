"""Arithmetic on stored scores: an ensemble's mixture, the fit of a calibration, and that of a gate.

    python benchmarks/ensemble.py                  64 experts, 1,000 blocks of 1,024 tokens
    python benchmarks/ensemble.py --blocks 100

Scores are made up: blocks are of one hidden domain each, experts are nearer to some than to others. The mixture
is the step's: scores are read from a store, checked, mixed by a calibrated posterior and summed by document.
Nothing else that we know of does this work, so the goals are seconds.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from contenders import fastest, measure
from results import Result, best_of_rounds, finish, parse, this_machine, today

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS = 1024
DEVELOPMENT_BLOCKS = 100
GATE_EXPERTS = 8
MIB = 2**20


def main() -> None:
    """Each row in a process of its own, so that its memory is its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", choices=("mix", "import", "calibrate", "gate"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parse(parser)
    if asked.ours:
        acts = {"mix": mix_stored, "import": import_alone, "calibrate": calibrate_once, "gate": fit_a_gate}
        acts[asked.ours](asked.folder, asked.experts, asked.blocks)
        return
    with tempfile.TemporaryDirectory(prefix="ensemble-") as scratch:
        folder = Path(scratch)
        store_scores(folder, asked.experts, asked.blocks)
        finish([mixing_row(folder, asked), *fit_rows(folder, asked)], asked)


def mixing_row(folder: Path, asked: argparse.Namespace) -> Result:
    """The mixture, less what the process takes to import."""

    def command(what: str) -> list[str]:
        sizes = ["--experts", str(asked.experts), "--blocks", str(asked.blocks)]
        return [sys.executable, __file__, "--ours", what, "--folder", str(folder), *sizes]

    imports = fastest([measure(command("import")) for _ in range(asked.rounds)])
    whole = fastest([measure(command("mix")) for _ in range(asked.rounds)])
    input_bytes = 4 * asked.experts * asked.blocks * BLOCK_TOKENS
    peak = whole.peak_anonymous_bytes - imports.peak_anonymous_bytes
    return row(
        "ensemble",
        f"{asked.experts} experts' scores of {asked.blocks:,} blocks of {BLOCK_TOKENS:,} tokens, "
        f"{input_bytes / MIB:.0f} MiB in a store, mixed by a calibrated posterior; imports left out, "
        f"{best_of_rounds(asked.rounds)}",
        whole.seconds - imports.seconds,
        2.0,
        {
            "CPU seconds": f"{whole.cpu_seconds - imports.cpu_seconds:.1f}",
            "memory": f"{peak / MIB:.0f} MiB above imports, {peak / input_bytes:.2f} times the input",
        },
    )


def fit_rows(folder: Path, asked: argparse.Namespace) -> list[Result]:
    """The two fits, each the best of a few in a process."""
    rows = []
    tokens = f"{DEVELOPMENT_BLOCKS} blocks of {BLOCK_TOKENS:,} tokens"
    cases = (
        (
            "calibration",
            "calibrate",
            asked.experts,
            2.0,
            f"log-prior and evidence weight of {asked.experts} experts",
        ),
        (
            "gate",
            "gate",
            GATE_EXPERTS,
            3.0,
            f"the learned gate of {GATE_EXPERTS} experts, from one for all texts,",
        ),
    )
    for name, what, experts, goal, shown in cases:
        command = [
            sys.executable,
            __file__,
            "--ours",
            what,
            "--folder",
            str(folder),
            "--experts",
            str(experts),
        ]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        seconds, cpu = map(float, said[-2:])
        rows.append(row(name, f"{shown} on {tokens}", seconds, goal, {"CPU seconds": f"{cpu:.1f}"}))
    return rows


def row(name: str, what: str, seconds: float, goal: float, beside: dict[str, str]) -> Result:
    """A row in seconds."""
    return Result(
        name=name,
        what=what,
        machine=this_machine(),
        measured=today(),
        unit="s",
        better="lower",
        ours=seconds,
        theirs=None,
        peer=None,
        goal=goal,
        limit=None,
        limit_is=None,
        beside=beside,
    )


def made_up(experts: int, blocks: int) -> np.ndarray:
    """Log-probabilities [E, B, T] in float32; the same for the same sizes."""
    random = np.random.default_rng(0)
    base = -random.exponential(3.0, (1, blocks, BLOCK_TOKENS)).astype(np.float32)
    near = 0.12 * random.standard_normal((experts, blocks, 1), dtype=np.float32)
    return np.stack(
        [
            np.minimum(
                base[0] + near[j] + 0.8 * random.standard_normal(base.shape[1:], dtype=np.float32), -0.01
            )
            for j in range(experts)
        ]
    )


def store_scores(folder: Path, experts: int, blocks: int) -> None:
    """Scores of every expert, and the blocks that they are of, as artifacts."""
    from btm_cluster.identity import Ref, identity_by
    from btm_cluster.ledger import Ledger, Origin

    ledger = Ledger.open(str(folder / "store"))
    owners = np.arange(blocks * BLOCK_TOKENS, dtype=np.int32).reshape(blocks, -1) // 700
    np.save(folder / "documents.npy", owners)

    def commit(kind: str, recipe: dict[str, int], name: str) -> None:
        made = Origin(Ref(kind, identity_by(kind, recipe, {})), recipe, {})
        ledger.commit(made, {name: folder / name}, {})

    commit("tokens", {}, "documents.npy")
    for number, logp_BT in enumerate(made_up(experts, blocks)):
        np.save(folder / "logp.npy", logp_BT)
        commit("scores", {"expert": number}, "logp.npy")


def import_alone(folder: Path, experts: int, blocks: int) -> None:  # noqa: ARG001
    """Imports what `mix_stored` does, and mixes nothing."""
    import torch

    import btm_cluster.steps.mix  # noqa: F401

    torch.zeros(1).exp()


def mix_stored(folder: Path, experts: int, blocks: int) -> None:  # noqa: ARG001
    """One calibrated mixture, as the step computes it."""
    import torch

    from btm_cluster.equations.posterior import Posterior
    from btm_cluster.identity import Ref, identity_by
    from btm_cluster.ledger import Ledger
    from btm_cluster.mixing.fitting import one_thread_each
    from btm_cluster.mixing.scores import ScoreStack
    from btm_cluster.steps.mix import mix  # noqa: F401 - what a step imports

    ledger = Ledger.open(str(folder / "store"))
    scores = [ledger.get(Ref("scores", identity_by("scores", {"expert": j}, {}))) for j in range(experts)]
    with one_thread_each() as threads:
        stack = ScoreStack(ledger, scores, [Ref("tokens", identity_by("tokens", {}, {}))], threads)
        log_prior_E = torch.log_softmax(torch.zeros(experts, dtype=torch.float64), dim=0)
        sums_UD = stack.mixture_sums(log_prior_E, Posterior("calibrated", weight=0.3))
    assert bool(sums_UD.isfinite().all()), "a sum that is none"


def calibrate_once(folder: Path, experts: int, blocks: int) -> None:  # noqa: ARG001
    """Prints wall and CPU seconds of the best of three fits."""
    import torch

    from btm_cluster.equations.calibration import calibrate
    from btm_cluster.equations.posterior import Posterior
    from btm_cluster.mixing.fitting import one_thread_each

    logp_EBT = torch.from_numpy(made_up(experts, DEVELOPMENT_BLOCKS)).double()
    mask_BT = torch.ones(logp_EBT.shape[1:], dtype=torch.bool)
    with one_thread_each():
        print(*best_of(3, lambda: calibrate(logp_EBT, mask_BT, Posterior("calibrated"))))


def fit_a_gate(folder: Path, experts: int, blocks: int) -> None:  # noqa: ARG001
    """Prints wall and CPU seconds of the best of two fits."""
    import torch

    from btm_cluster.equations.learned_gate import TextScores, fit_gate, tune_gate
    from btm_cluster.mixing.fitting import one_thread_each

    logp_EBT = torch.from_numpy(made_up(experts, DEVELOPMENT_BLOCKS)).double()
    mask_BT = torch.ones(logp_EBT.shape[1:], dtype=torch.bool)
    text = TextScores(logp_EBT, made_up_entropies(-logp_EBT), mask_BT)
    few = TextScores(logp_EBT[:, :10], text.entropy_EBT[:, :10], mask_BT[:10])
    with one_thread_each():
        start = fit_gate([few])
        print(*best_of(2, lambda: tune_gate(text, start)))


def made_up_entropies(surprise_EBT: "torch.Tensor") -> "torch.Tensor":
    """Entropies that know how surprising a block is to an expert, and not which token comes: [experts, blocks, tokens]."""
    import torch

    torch.manual_seed(0)
    shared, own = torch.randn_like(surprise_EBT[:1]), torch.randn_like(surprise_EBT)
    return surprise_EBT.mean(dim=-1, keepdim=True) * (0.5 * shared + 0.1 * own).exp()


def best_of(times: int, act: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of the quickest."""
    taken = []
    for _ in range(times):
        wall, cpu = time.monotonic(), time.process_time()
        act()
        taken.append((time.monotonic() - wall, time.process_time() - cpu))
    return min(taken)


if __name__ == "__main__":
    main()
