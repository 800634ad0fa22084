"""What a server is told: sizes and limits of a replica, and how many there are."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

API_KEY = "BTM_API_KEY"
"""Environment variable with the key that callers need."""
FOLLOW_SECONDS = 10.0
"""How often a store is asked for a newer version of its forest."""


@dataclass(frozen=True)
class ServingSettings:
    """Sizes and limits of one replica."""

    rows: int = 32
    """Sequences that are written at once."""
    waiting: int = 512
    """Prompts and texts that may wait for a row; beyond them, callers get 429."""
    prompts: int = 128
    """Prompts of one request, times its number of samples."""
    seconds: float = 300.0
    """Longest time that one request may take."""
    body_bytes: int = 8 * 2**20
    other_models: int = 2
    """Single models beside the ensemble's that are kept loaded."""
    precision: Literal["float32", "bfloat16"] = "float32"
    key_digest: str | None = None
    """Of the API key that callers need; without one, everybody may call."""


class ForestArguments(BaseModel):
    """What is served, and by how many replicas: the `args` of a Serve configuration."""

    model_config = ConfigDict(extra="forbid")
    store: str
    forest_version: int | None = None
    """By default the newest, and each newer one as it comes."""
    settings: ServingSettings = ServingSettings()
    follow_seconds: float = FOLLOW_SECONDS
    replicas: int = 1
    gpus_per_replica: float = 0
    cpus_per_replica: float = 1
    autoscaling: dict[str, Any] | None = None
    """Of Ray Serve, such as {min_replicas: 1, max_replicas: 4}, instead of a fixed number."""
