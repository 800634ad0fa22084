"""Language models on one machine or one process group: build, train, score, average, generate.

Knows no Ray and no store.
"""
