"""Files of JSON lines to token blocks, beside `datasets.map` with the same tokenizer; and reading them
compressed, beside `zstd -d | jq -c`.

    python benchmarks/text_to_blocks.py                    1 GB in four texts
    python benchmarks/text_to_blocks.py --megabytes 40     a quick look

Ours reads, drops duplicates, splits, sorts by content and stores each text, and then its blocks, by the steps
of a run, as many at once as there are cores. The peer does as transformers' examples do: it loads the files,
maps the tokenizer over them and then a function that cuts blocks, with a process for each core, and drops no
duplicates. Both start from files and end in files.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from contenders import Usage, fastest, in_turn
from results import Result, best_of_rounds, finish, parse, this_machine, today
from synthetic_text import write_jsonl

TEXTS = 4
BLOCK_TOKENS = 1024
VOCABULARY = 16_384
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MB = 10**6


def main() -> None:
    """Makes the text, and runs both contenders of both rows in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=("blocks", "compressed"))
    parser.add_argument("--ours", choices=("blocks", "compressed"), help=argparse.SUPPRESS)
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parse(parser)
    if asked.ours:
        {"blocks": blocks_of_ours, "compressed": read_compressed}[asked.ours](asked.folder)
        return
    if asked.theirs:
        blocks_of_theirs(asked.folder)
        return
    with tempfile.TemporaryDirectory(prefix="text-to-blocks-") as scratch:
        folder = Path(scratch)
        text_bytes = sum(
            write_jsonl(folder / f"text-{number}.jsonl", asked.megabytes * MB // TEXTS, number)
            for number in range(TEXTS)
        )
        rows = {"blocks": compare_blocks, "compressed": compare_compressed}
        finish(
            [row(folder, text_bytes, asked) for name, row in rows.items() if asked.only in (None, name)],
            asked,
        )


def compare_blocks(folder: Path, text_bytes: int, asked: argparse.Namespace) -> Result:
    """Ours beside datasets."""
    import datasets

    train_tokenizer(folder)
    commands = {
        "ours": [sys.executable, __file__, "--ours", "blocks", "--folder", str(folder)],
        "theirs": [sys.executable, __file__, "--theirs", "--folder", str(folder)],
    }
    taken = taken_by(commands, asked.rounds, lambda who: shutil.rmtree(folder / who))
    what = (
        f"{text_bytes / MB:,.0f} MB of text in {TEXTS} files of JSON lines to blocks of {BLOCK_TOKENS:,} tokens, "
        f"by a byte-level BPE of {VOCABULARY:,}; ours also drops duplicates, splits and sorts; whole processes, "
        f"{best_of_rounds(asked.rounds)}"
    )
    peer = f"datasets {datasets.__version__}, `load_dataset`, then `map` twice with {CORES} processes"
    return row_of("text-to-blocks", what, peer, text_bytes, taken)


def compare_compressed(folder: Path, text_bytes: int, asked: argparse.Namespace) -> Result:
    """Ours beside two programs in a pipe."""
    file = folder / "text-0.jsonl"
    subprocess.run(["zstd", "-q", str(file), "-o", f"{file}.zst"], check=True)
    commands = {
        "ours": [sys.executable, __file__, "--ours", "compressed", "--folder", str(folder)],
        "theirs": ["bash", "-c", f"zstd -dc '{file}.zst' | jq -c . > /dev/null"],
    }
    taken = taken_by(commands, asked.rounds)
    what = (
        f"{text_bytes / TEXTS / MB:,.0f} MB of text as JSON lines, compressed by zstd, to documents in memory, one "
        f"at a time; whole processes, {best_of_rounds(asked.rounds)}"
    )
    peer = f"`zstd -dc | jq -c .` of {said_by('zstd')} and {said_by('jq')}"
    return row_of("compressed-text", what, peer, text_bytes // TEXTS, taken)


def taken_by(
    commands: Mapping[str, Sequence[str]], rounds: int, between: Callable[[str], None] = lambda _: None
) -> dict[str, Usage]:
    """The fastest run of each."""
    return {who: fastest(runs) for who, runs in in_turn(commands, rounds, between).items()}


def row_of(name: str, what: str, peer: str, text_bytes: int, taken: Mapping[str, Usage]) -> Result:
    """A row in MB of text per second."""
    ours, theirs = taken["ours"], taken["theirs"]
    return Result(
        name=name,
        what=what,
        machine=this_machine(),
        measured=today(),
        unit="MB/s",
        better="higher",
        ours=text_bytes / MB / ours.seconds,
        theirs=text_bytes / MB / theirs.seconds,
        peer=peer,
        goal=1.0,
        limit=None,
        limit_is=None,
        beside={
            "CPU seconds": f"{ours.cpu_seconds:.1f}, theirs {theirs.cpu_seconds:.1f}",
            "peak anonymous memory of all processes": f"{ours.peak_anonymous_bytes / 2**20:,.0f} MiB, "
            f"theirs {theirs.peak_anonymous_bytes / 2**20:,.0f} MiB",
        },
    )


def said_by(program: str) -> str:
    """A program's version, as it says it."""
    said = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    return next(part.strip("*, ") for part in said.split() if any(map(str.isdigit, part)) and "." in part)


def train_tokenizer(folder: Path) -> None:
    """On the beginning of the first text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    with (folder / "text-0.jsonl").open(encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(3000), strict=False)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(lines, VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    whole.save_pretrained(str(folder / "tokenizer"))


def blocks_of_ours(folder: Path) -> None:
    """Our process: the steps, as a scheduler with these cores starts them."""
    from btm_cluster.identity import Ref
    from btm_cluster.ledger import Ledger
    from btm_cluster.requests import Tokenize

    (folder / "ours").mkdir()
    store = str(folder / "ours/store")
    tokenizer = store_tokenizer(folder, store)
    with ProcessPoolExecutor(CORES, get_context("spawn"), initializer=one_thread) as pool:
        sources = list(pool.map(read_source, [folder] * TEXTS, [store] * TEXTS, range(TEXTS)))
        ledger = Ledger.open(store)
        asked = []
        for text in sources:
            splits = ledger.get(Ref("text", text)).facts["splits"]
            asked += [
                Tokenize("blocks", text, split, shard, tokenizer, BLOCK_TOKENS)
                for split, facts in splits.items()
                for shard in facts["shards"]
            ]
        list(pool.map(tokenize_shard, [store] * len(asked), asked))


def one_thread() -> None:
    """Processes share the cores; threads within them would fight for these."""
    os.environ["RAYON_NUM_THREADS"] = "1"


def store_tokenizer(folder: Path, store: str) -> Any:
    """The tokenizer as an artifact; its reference."""
    from btm_cluster.data.tokenizer import import_tokenizer, open_pretrained_tokenizer
    from btm_cluster.identity import Ref, identity_by
    from btm_cluster.ledger import Ledger, Origin

    source = folder / "tokenizer"
    opened = open_pretrained_tokenizer(source)
    files = import_tokenizer(source, opened, folder / "ours/tokenizer")
    origin = Origin(Ref("tokenizer", identity_by("tokenizer", {}, {})), {}, {})
    return Ledger.open(store).commit(origin, files, {"first_token": opened.first_token}).ref


def read_source(folder: Path, store: str, number: int) -> str:
    """One text, by the step that reads it; its identity."""
    from btm_cluster.data.sources import fingerprint
    from btm_cluster.ledger import Ledger
    from btm_cluster.plan import ReadingPlan, TextPlan
    from btm_cluster.requests import ReadText
    from btm_cluster.steps.read import read_text

    source = TextPlan(name=f"text-{number}", text=[str(folder / f"text-{number}.jsonl")])
    request = ReadText(source.name, source, ReadingPlan(), False, fingerprint(source))
    return str(read_text(request, Ledger.open(store), Silent()).parts[0].identity)


def tokenize_shard(store: str, request: Any) -> None:
    """One shard, by its step."""
    from btm_cluster.ledger import Ledger
    from btm_cluster.steps.tokenize import tokenize

    tokenize(request, Ledger.open(store), Silent())


class Silent:
    """A step's line to nobody; as on Ray, a process that has no use for torch does not import it."""

    def report(self, progress: Any) -> None:
        """Tells nobody."""

    def stopping(self) -> bool:
        """Never."""
        return False

    def saving(self) -> bool:
        """Never."""
        return False


def read_compressed(folder: Path) -> None:
    """Our process of the other row."""
    from btm_cluster.data.sources import read_documents
    from btm_cluster.plan import ReadingPlan, TextPlan

    source = TextPlan(name="text", text=[str(folder / "text-0.jsonl.zst")])
    count = sum(1 for _ in read_documents(source, ReadingPlan()))
    assert count, "no document was read"


def blocks_of_theirs(folder: Path) -> None:
    """The peer's process, after transformers' run_clm.py."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"), model_max_length=10**9)
    files = [str(folder / f"text-{number}.jsonl") for number in range(TEXTS)]
    data = load_dataset("json", data_files=files, split="train", cache_dir=str(folder / "theirs"))

    def tokenised(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*one, tokenizer.eos_token_id] for one in ids]}

    def cut(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = [token for ids in rows["input_ids"] for token in ids]
        whole = len(joined) - len(joined) % BLOCK_TOKENS
        return {"input_ids": [joined[at : at + BLOCK_TOKENS] for at in range(0, whole, BLOCK_TOKENS)]}

    data = data.map(tokenised, batched=True, num_proc=CORES, remove_columns=data.column_names)
    data.map(cut, batched=True, num_proc=CORES)


if __name__ == "__main__":
    main()
