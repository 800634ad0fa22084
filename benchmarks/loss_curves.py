"""Whether what is fast is right: curves of loss and scores, as trainings on a GPU compute them, beside plain float32.

    python benchmarks/loss_curves.py 125m --updates 200
    python benchmarks/loss_curves.py small --optimizer muon

The same training three times, from the same weights and blocks: in float32, uncompiled; the same from another random
seed, which shows how far noise goes; and in bf16, compiled, with the kernels and graphs that a training takes. Prints
the mean loss of each tenth of the updates, and the largest gap between the first and the others. Then scores of some
blocks, in bf16 and compiled, beside float32's: mean and largest difference of log-probabilities and entropies, in nats.

Text is drawn from a random table of which eight tokens follow which, so that there is something to learn. On a CPU it
runs a toy size, uncompiled.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bare_training import GPT2, Shape, compute_of, gpt2, spec_of

from btm_cluster.data.blocks import Blocks
from btm_cluster.language_model import scoring
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.scoring import ScorePasses
from btm_cluster.language_model.training_spec import TrainingSpec
from btm_cluster.language_model.training_state import TrainingState, build_state
from btm_cluster.language_model.update import Updates
from btm_cluster.requests import Resources

SIZES = {  # blocks per update, and per forward pass
    "toy": Shape(gpt2(1, 64, 2), 512, 4, 4, 64),
    "small": Shape(gpt2(4, 256, 4), 16_384, 8, 8),
    "125m": Shape(gpt2(*GPT2["125m"]), 50_304, 16, 8),
}
BLOCKS, FOLLOWERS, SCORED = 512, 8, 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    asked = parser.parse_args()
    shape = SIZES[asked.size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = compute_of(shape, device)
    plain = replace(fast, precision="float32", compile=False)
    with tempfile.TemporaryDirectory() as scratch:
        np.save(Path(scratch, "tokens.npy"), text(shape))
        spec = spec_of(shape, asked.updates, 1, Path(scratch), plain)
        recipe = {"optimizer": asked.optimizer, "learning_rate": 1e-3}
        spec = replace(spec, training=spec.training.model_copy(update=recipe))
        other = replace(spec, training=spec.training.model_copy(update={"random_seed": 1}))
        # TF32 would be used in training; what it is compared with is exact.
        torch.set_float32_matmul_precision("highest")
        exact, state = trained(spec)
        noise, _ = trained(other)
        fast.set_up()
        quick, _ = trained(replace(spec, compute=fast))
        show({"float32": exact, "float32, another seed": noise, "as trainings are": quick})
        compare_scores(state, spec, device, Path(scratch))


def text(shape: Shape) -> np.ndarray:
    """Blocks in which each token is followed by one of eight, uint16 [BLOCKS, block_tokens]."""
    draw = np.random.default_rng(0)
    follows = draw.integers(1, shape.vocabulary, (shape.vocabulary, FOLLOWERS))
    tokens = np.empty((BLOCKS, shape.block_tokens), dtype=np.uint16)
    tokens[:, 0] = draw.integers(1, shape.vocabulary, BLOCKS)
    choices = draw.integers(FOLLOWERS, size=tokens.shape)
    for place in range(1, shape.block_tokens):
        tokens[:, place] = follows[tokens[:, place - 1], choices[:, place]]
    return tokens


def trained(spec: TrainingSpec) -> tuple[list[float], TrainingState]:
    """The loss of every update, and the state after the last."""
    group = ProcessGroup.joined(spec.compute.device)
    state = build_state(spec, group)
    updates = Updates(spec, state, group)
    losses = []
    while state.update < spec.last_update:
        losses.append(updates.make().shown)
        state.update += 1
    return [float(loss.read()[0]) for loss in losses], state


def show(curves: dict[str, list[float]]) -> None:
    """A line for each curve, by tenths."""
    tenths = {
        name: [statistics.mean(part) for part in np.array_split(losses, 10)]
        for name, losses in curves.items()
    }
    first = next(iter(tenths.values()))
    for name, means in tenths.items():
        gap = max(abs(one - other) for one, other in zip(means, first, strict=True))
        print(f"{name:24} {' '.join(f'{mean:.3f}' for mean in means)}   largest gap {gap:.4f}")


def compare_scores(state: TrainingState, spec: TrainingSpec, device: torch.device, folder: Path) -> None:
    """Prints how far fast scores are from float32's."""
    on_gpu = device.type == "cuda"
    scoring.WORTH_COMPILING = 0
    blocks = Blocks([folder / "tokens.npy"], first=SCORED)
    found = {}
    for precision in ("float32", "bfloat16"):
        how = Resources(1, float(on_gpu), 1, 8, precision, compile=precision == "bfloat16")
        scoring.set_up_scoring(how)
        passes = ScorePasses(state.model, how, spec.training.block_tokens, [SCORED])
        found[precision] = {name: np.load(file) for name, file in passes.write(blocks, 0, folder).items()}
    for name, exact in found["float32"].items():
        gaps = np.abs(found["bfloat16"][name] - exact)
        print(
            f"{name}: mean difference {gaps.mean():.5f}, largest {gaps.max():.4f}, of {np.abs(exact).mean():.3f}"
        )


if __name__ == "__main__":
    main()
