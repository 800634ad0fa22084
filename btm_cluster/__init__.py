"""Branch-Train-Merge language-model training as a service on Ray.

`import btm_cluster as btm` gives the Python API, the names of `__all__`; docs/reference/python.md describes it. Each is
imported when it is first used, so that the command line starts without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btm_cluster.api.ensemble import OpenEnsemble
    from btm_cluster.api.forest import OpenForest, StoredModel, open_forest
    from btm_cluster.api.plans import run
    from btm_cluster.errors import BtmError, Stopped, UserError
    from btm_cluster.evaluation.verdict import Verdict
    from btm_cluster.language_model.document_scores import Scored
    from btm_cluster.operations.generate import Generated
    from btm_cluster.operations.run import Run
    from btm_cluster.plan import Plan, read_plan

__version__ = "0.1.0"
__all__ = [
    "BtmError",
    "Generated",
    "OpenEnsemble",
    "OpenForest",
    "Plan",
    "Run",
    "Scored",
    "Stopped",
    "StoredModel",
    "UserError",
    "Verdict",
    "open_forest",
    "read_plan",
    "run",
]
_NAMES = {
    "api.ensemble": ("OpenEnsemble",),
    "api.forest": ("OpenForest", "StoredModel", "open_forest"),
    "api.plans": ("run",),
    "errors": ("BtmError", "Stopped", "UserError"),
    "evaluation.verdict": ("Verdict",),
    "language_model.document_scores": ("Scored",),
    "operations.generate": ("Generated",),
    "operations.run": ("Run",),
    "plan": ("Plan", "read_plan"),
}
"""The same by module; the imports above are for type checkers."""


if not TYPE_CHECKING:  # or else a type checker takes every name for one that is there

    def __getattr__(name: str) -> Any:
        for module, names in _NAMES.items():
            if name in names:
                return getattr(importlib.import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
