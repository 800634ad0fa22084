"""Settings of a server: sizes and limits of a replica, and how many there are."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

API_KEY = "BTM_API_KEY"
"""Environment variable with the key that callers need."""
FOLLOW_SECONDS = 10.0
"""How often a store is asked for a newer version of its forest."""
AtLeastOne = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class ServingSettings:
    """Sizes and limits of one replica."""

    rows: AtLeastOne = 32
    """Sequences that are written at once."""
    waiting: Annotated[int, Field(ge=0)] = 512
    """Prompts and texts that may wait for a row; beyond them, callers get 429."""
    prompts: AtLeastOne = 128
    """Prompts of one request, times its number of samples."""
    timeout_seconds: Positive = 300.0
    """Longest time that one request may take."""
    body_bytes: AtLeastOne = 8 * 2**20
    other_models: AtLeastOne = 2
    """Single models beside the ensemble's that are kept loaded."""
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    """Such as `cpu`; by default the GPU where the process sees one."""
    key_digest: str | None = None
    """Hash of the API key that callers need; without one, everybody may call."""


class ForestArguments(BaseModel):
    """The forest that is served, and by how many replicas: the `args` of a Serve configuration."""

    model_config = ConfigDict(extra="forbid")
    store: Annotated[str, Field(min_length=1)]
    forest_version: int | None = None
    """By default the newest, and each newer one as it comes."""
    settings: ServingSettings = ServingSettings()
    follow_seconds: Positive = FOLLOW_SECONDS
    replicas: AtLeastOne = 1
    gpus_per_replica: NotNegative | None = None
    """0 serves on CPUs. By default 1 where the cluster has a GPU when serving starts, and else 0."""
    cpus_per_replica: NotNegative = 1
    autoscaling: dict[str, Any] | None = None
    """Ray Serve's settings, such as {min_replicas: 1, max_replicas: 4}, instead of a fixed number."""
