"""What a driver imports before it joins Ray, which is not among it: see tests/forked.py."""

import sys

import transformers.models.gpt2.modeling_gpt2  # the architecture of the tests' plans

import btm_cluster.cli
import btm_cluster.operations.run
import btm_cluster.terminal.progress
import btm_cluster.terminal.verdict
import btm_cluster.tracking.tracking
import btm_cluster.workers.in_process  # noqa: F401

assert "ray" not in sys.modules
assert transformers.models.gpt2.modeling_gpt2
