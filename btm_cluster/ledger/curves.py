"""The curves of trainings, which are stored with their models."""

from pathlib import Path

from pydantic import ValidationError

from btm_cluster.curve import CURVE_FILE, Curve
from btm_cluster.errors import UserError, one_line
from btm_cluster.ledger.artifact import Artifact
from btm_cluster.ledger.ledger import Ledger


def read_curve(ledger: Ledger, artifact: Artifact) -> Curve | None:
    """The curve of the training that made a model; None where the model has none.

    Models that were imported or averaged have none, nor those of earlier versions. The curve of a DEMix is with
    the artifact that names its parts.

    Raises:
        UserError: the file is whole, and holds no curve.
        StoreError: it cannot be read.
    """
    return parse_curve(ledger.open_file(artifact, CURVE_FILE), artifact) if artifact.has(CURVE_FILE) else None


def parse_curve(file: Path, artifact: Artifact) -> Curve:
    """The curve in a file of an artifact.

    Raises:
        UserError: it holds none.
    """
    try:
        return Curve.model_validate_json(file.read_bytes())
    except ValidationError as exc:
        raise UserError(
            f"{CURVE_FILE} of {artifact.kind} {artifact.identity[:12]} holds no curve",
            found=one_line(exc),
            expected="the fields that this version of btm_cluster writes",
            remedy="use the version that wrote it, or a newer one",
        ) from exc
