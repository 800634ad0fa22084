"""A uniform average of eight models in bf16, beside mergekit's `linear`.

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5
    python benchmarks/averaging.py --mergekit /tmp/mergekit/bin/mergekit-yaml

Ours is the step: from models in a store to an average in it. Every byte that is written is hashed, and every byte that
is read, the first time that this node reads a file; the row's seconds are those of later averages, and the first one's
stand beside them. mergekit reads folders and writes one, and checks nothing. Each is a process of its own, timed from
start to exit, with the files in the system's cache.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from contenders import Usage, fastest, in_turn, measure
from results import Result, best_of_rounds, finish, parse, quantity, this_machine, today

if TYPE_CHECKING:
    from btm_cluster.ledger import Ledger

SHAPES = {  # layers, width, width of feed-forwards, heads, vocabulary
    "toy": (2, 64, 128, 2, 512),
    "374m": (24, 1024, 2816, 16, 32_000),
}
MODELS = 8
FIRST = "first"
"""Our first average on a node, by name of its contender and of its node's cache."""
MIB = 2**20


def main() -> None:
    """Makes the models, runs both contenders in turn, and checks that both averages are the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="374m")
    parser.add_argument("--mergekit", help="its executable mergekit-yaml; without it, ours alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for 8 GB of files; default: a temporary one")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # the process of our own
    asked = parse(parser)
    if asked.ours:
        average_in(asked.ours)
        return
    with tempfile.TemporaryDirectory(prefix="averaging-", dir=asked.folder) as scratch:
        folder = Path(scratch)
        os.environ["BTM_CACHE_FOLDER"] = str(folder / "cache")
        input_bytes = make_models(folder, asked.size)
        finish([compare(folder, input_bytes, asked)], asked)


def compare(folder: Path, input_bytes: int, asked: argparse.Namespace) -> Result:
    """Both contenders on the same files."""
    ours = [sys.executable, __file__, "--ours", str(folder)]
    commands = {"ours": ours, FIRST: ["env", f"BTM_CACHE_FOLDER={folder / FIRST}", *ours]}
    if asked.mergekit:
        write_recipe(folder)
        commands["theirs"] = [
            asked.mergekit,
            str(folder / "linear.yaml"),
            str(folder / "theirs"),
            "--no-copy-tokenizer",
        ]
    for who in commands.keys() - {FIRST}:  # fills the system's cache, and compiles what Python imports
        measure(commands[who])
    if asked.mergekit:
        check_same(folder)
    for who in commands:
        clear(folder, who)
    runs = in_turn(commands, asked.rounds, partial(clear, folder))
    taken = {who: fastest(of_one) for who, of_one in runs.items()}
    return result_of(taken, input_bytes, seconds_to_read(folder), asked)


def result_of(taken: dict[str, Usage], input_bytes: int, limit: float, asked: argparse.Namespace) -> Result:
    """The row."""
    figures = {
        "CPU seconds": lambda usage: f"{usage.cpu_seconds:.1f}",
        "peak anonymous memory": lambda usage: f"{usage.peak_anonymous_bytes / MIB:,.0f} MiB",
        "peak resident memory, with mapped files": lambda usage: f"{usage.peak_bytes / MIB:,.0f} MiB",
    }
    ours, first, theirs = taken["ours"], taken[FIRST], taken.get("theirs")
    return Result(
        name="averaging",
        what=f"{MODELS} Llama-shaped models in bf16, {quantity(input_bytes / 1e9, 'GB')}, on a warm cache; ours "
        "from a store on the same disk to that store, files checked by their status since this node hashed them, and "
        f"hashed on writing; whole processes, {best_of_rounds(asked.rounds)}",
        machine=this_machine(),
        measured=today(),
        unit="s",
        better="lower",
        ours=ours.seconds,
        theirs=theirs.seconds if theirs else None,
        peer=f"mergekit {version_of(asked.mergekit)}, `linear`" if theirs else None,
        goal=3.0 if theirs else None,
        limit=limit,
        limit_is="reading all models from the system's cache with two threads and writing one, with fsync",
        beside={
            "the first average on a node, which hashes all that it reads": f"{quantity(first.seconds, 's')}, "
            f"{first.cpu_seconds:.1f} CPU seconds",
        }
        | {
            name: figure(ours) + (f", theirs {figure(theirs)}" if theirs else "")
            for name, figure in figures.items()
        },
    )


def make_models(folder: Path, size: str) -> int:
    """Models of random weights in a store, and as folders of the same files; their bytes."""
    import torch

    from btm_cluster.language_model.tensor_files import layout, write_tensors
    from btm_cluster.ledger import Ledger

    shapes = llama(*SHAPES[size])
    ledger, total = Ledger.open(str(folder / "store")), 0
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **fields(*SHAPES[size])}
    for number in range(MODELS):
        generator = torch.Generator().manual_seed(number)
        model = folder / f"model-{number}"
        model.mkdir()
        header = layout({n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in shapes.items()})
        tensors = ((name, torch.randn(shape, generator=generator)) for name, shape in shapes.items())
        write_tensors(header, tensors, model / "model.safetensors")
        (model / "config.json").write_text(json.dumps(config))
        total += (model / "model.safetensors").stat().st_size
        _commit(ledger, model, number)
    return total


def _commit(ledger: "Ledger", model: Path, number: int) -> None:
    """Stores a model as an expert. The folder's weights become a link to the store's."""
    from btm_cluster.data.tokenizer import TOKENIZER_FILES
    from btm_cluster.ledger import Origin, Ref, blob_key, identity_by

    nothing = model.parent / "tokenizer.json"
    nothing.write_text("{}")
    files = dict.fromkeys(TOKENIZER_FILES, nothing)
    files |= {name: model / name for name in ("model.safetensors", "config.json")}
    recipe = {"number": number}
    origin = Origin(Ref("model", identity_by("model", recipe, {})), recipe, {})
    made = ledger.commit(origin, files, {"origin": "0" * 64})
    (model / "model.safetensors").unlink()
    stored = ledger.storage.address(blob_key(made.ref, made.blob("model.safetensors").sha256))
    os.link(stored, model / "model.safetensors")


def average_in(folder: Path) -> None:
    """Our process: the step, as a worker's process does it, which imports torch when the first step asks for it."""
    from btm_cluster.ledger import Ledger
    from btm_cluster.requests import AverageRequest
    from btm_cluster.steps.registry import run_batch

    ledger = Ledger.open(str(folder / "store"))
    models = tuple(one.ref for one in ledger.list_artifacts("model") if "number" in one.recipe)
    request = AverageRequest("average", models, (1 / len(models),) * len(models))
    list(run_batch([request], ledger, Silent()))


class Silent:
    """A step's line to a driver that asks for nothing."""

    def report(self, _: object) -> None:
        pass

    def stopping(self) -> bool:
        return False

    def saving(self) -> bool:
        return False


def write_recipe(folder: Path) -> None:
    """mergekit's own, for the same average."""
    models = [
        {"model": str(folder / f"model-{number}"), "parameters": {"weight": 1.0}} for number in range(MODELS)
    ]
    recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    (folder / "linear.yaml").write_text(yaml.safe_dump(recipe))


def check_same(folder: Path) -> None:
    """Stops where the two averages differ by more than the rounding of bf16: they are summed in other orders."""
    import torch

    from btm_cluster.language_model.stored_weights import TensorFiles

    theirs = TensorFiles(sorted((folder / "theirs").glob("*.safetensors")))
    ours = TensorFiles(our_averages(folder))
    for name in theirs.header:
        if name == "__metadata__":
            continue
        if not torch.allclose(ours.read(name), theirs.read(name), rtol=2**-7, atol=1e-6):
            raise SystemExit(f"{name} is another in the two averages")


def our_averages(folder: Path) -> list[Path]:
    """The weights of the averages in the store."""
    from btm_cluster.ledger import Ledger

    ledger = Ledger.open(str(folder / "store"))
    made = [one for one in ledger.list_artifacts("model") if "number" not in one.recipe]
    return [ledger.open_file(one, "model.safetensors") for one in made]


def clear(folder: Path, who: str) -> None:
    """Removes what a contender made."""
    if who == "theirs":
        shutil.rmtree(folder / "theirs")
        return
    if who == FIRST:
        shutil.rmtree(folder / FIRST, ignore_errors=True)  # small models leave nothing there
    for average in our_averages(folder):
        average.unlink()
    for manifest in (folder / "store/artifacts/model").iterdir():
        if '"number"' not in manifest.read_text():
            manifest.unlink()


def seconds_to_read(folder: Path) -> float:
    """Reading every model once, by two threads, and writing one."""
    files = sorted(folder.glob("model-*/model.safetensors"))
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_read, files))
    shutil.copyfile(files[0], folder / "copy")
    with open(folder / "copy", "rb+") as file:
        os.fsync(file.fileno())
    return time.monotonic() - started


def _read(file: Path) -> None:
    buffer = bytearray(MIB)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def version_of(executable: str) -> str:
    """The version of the mergekit that an executable belongs to."""
    python = Path(executable).parent / "python"
    asked = "import importlib.metadata; print(importlib.metadata.version('mergekit'))"
    return subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()


def fields(layers: int, width: int, feed_forward: int, heads: int, vocabulary: int) -> dict[str, int]:
    """The configuration of a shape."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
    }


def llama(layers: int, width: int, feed_forward: int, heads: int, vocabulary: int) -> dict[str, list[int]]:
    """Shapes of a Llama's tensors by name."""
    del heads
    shapes = {name: [vocabulary, width] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shapes["model.norm.weight"] = [width]
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{one}_proj.weight": [width, width] for one in "qkvo"}
        shapes |= {f"{block}.mlp.{one}_proj.weight": [feed_forward, width] for one in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = [width, feed_forward]
        shapes |= {f"{block}.{one}_layernorm.weight": [width] for one in ("input", "post_attention")}
    return shapes


if __name__ == "__main__":
    main()
