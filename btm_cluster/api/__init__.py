"""The Python API, what `import btm_cluster` gives: runs a plan, opens a forest, uses its ensemble and models.

docs/reference/python.md describes it. Each call does what the command of its name does, by the same operations.
"""
