"""The curves of trainings, which are stored with their models."""

import logging
from pathlib import Path

from pydantic import ValidationError

from btm_cluster.curve import CURVE_FILE, Curve, Rise
from btm_cluster.errors import StoreError, UserError, one_line
from btm_cluster.identity import Ref
from btm_cluster.ledger.artifact import Artifact
from btm_cluster.ledger.ledger import Ledger

log = logging.getLogger(__name__)


def read_curve(ledger: Ledger, artifact: Artifact) -> Curve | None:
    """The curve of the training that made a model; None where the model has none.

    Models that were imported or averaged have none, nor those of earlier versions. The curve of a DEMix is with
    the artifact that names its parts.

    Raises:
        UserError: the file is whole, and holds no curve.
        StoreError: it cannot be read.
    """
    return parse_curve(ledger.open_file(artifact, CURVE_FILE), artifact) if artifact.has(CURVE_FILE) else None


def read_rise(ledger: Ledger, model: Ref | None) -> Rise | None:
    """By how much a model's training loss ended above its lowest, if it did and its curve can be read."""
    try:
        artifact = None if model is None else ledger.find(model)
        curve = None if artifact is None else read_curve(ledger, artifact)
    except (StoreError, UserError) as exc:
        log.warning("whether a training's loss rose is not known: %s", exc.what)
        return None
    return None if curve is None else curve.rise()


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
