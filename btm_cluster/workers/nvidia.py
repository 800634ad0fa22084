"""Facts about this machine's GPUs by NVIDIA's own program, which imports nothing and holds no memory on them."""

import subprocess

PROGRAM_SECONDS = 120.0
"""Longest wait for it."""


def gpu_bytes() -> int | None:
    """Memory of the largest GPU here; None where NVIDIA's driver does not say."""
    megabytes = [int(total) for (total,) in gpu_facts("memory.total") if total.isdigit()]
    return max(megabytes) << 20 if megabytes else None


def gpu_facts(*fields: str) -> list[list[str]]:
    """The named fields of `nvidia-smi --query-gpu` for each GPU, without units; empty without GPU or program."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(
            query,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROGRAM_SECONDS,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip().split(", ") for line in said.splitlines() if line.strip()]
