"""What a driver imports before it joins Ray, which is not among it: see tests/forked.py."""

import sys

import btm_cluster.display
import transformers.models.gpt2.modeling_gpt2  # noqa: F401 (the architecture of the tests' plans)

import btm_cluster.cli
import btm_cluster.in_process
import btm_cluster.run
import btm_cluster.tracking  # noqa: F401

assert "ray" not in sys.modules
