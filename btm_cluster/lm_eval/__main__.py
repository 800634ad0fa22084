"""`python -m btm_cluster.lm_eval`: the harness's own command line, which knows the model `btm`."""

import importlib
import sys

from btm_cluster.errors import BtmError
from btm_cluster.lm_eval import ENTRY_POINT, MODEL


def main() -> None:
    """Runs `lm_eval` with the same arguments; errors of ours are a message and an exit code."""
    try:
        command = importlib.import_module("lm_eval.__main__")
        # This fills the registry, which it does only while that is empty.
        importlib.import_module("lm_eval.models")
        registry = importlib.import_module("lm_eval.api.registry").model_registry
    except ImportError as exc:
        sys.exit(
            f"error: lm-evaluation-harness cannot be imported: {exc}\n  remedy:   pip install 'lm-eval>=0.4.13'"
        )
    if MODEL not in registry:
        registry.register(MODEL, target=ENTRY_POINT)
    try:
        command.cli_evaluate()
    except BtmError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)


if __name__ == "__main__":
    main()
