"""The model `btm` of lm-evaluation-harness: a forest's ensemble, measured by its tasks.

Versions of the harness after 0.4.13 find it by its entry point. `python -m btm_cluster.lm_eval` is `lm_eval`
with the model known, whatever the version.
"""

MODEL = "btm"
ENTRY_POINT = "btm_cluster.lm_eval.model:ForestLM"
"""As in pyproject.toml."""
