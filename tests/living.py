"""What tests of a living forest share: deliveries to an inbox."""

import json
from pathlib import Path

from btm_cluster.ledger import Ledger
from tests.conftest import made_up_documents


def deliver(
    ledger: Ledger, folder: Path, name: str, documents: list[str] | None = None, ready: bool = True
) -> None:
    """Puts a domain into the inbox of any store, its marker last."""
    texts = made_up_documents(name, 120) if documents is None else documents
    put(
        ledger,
        folder,
        f"{name}/a.jsonl",
        "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(),
    )
    if ready:
        put(ledger, folder, f"{name}/READY", b"")


def put(ledger: Ledger, folder: Path, path: str, data: bytes) -> None:
    """Writes one file of the inbox."""
    file = folder / "to-deliver"
    file.write_bytes(data)
    ledger.storage.upload(f"inbox/{path}", file)
