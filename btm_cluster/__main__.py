"""`python -m btm_cluster` is `btm`."""

from btm_cluster.cli import main

main()
