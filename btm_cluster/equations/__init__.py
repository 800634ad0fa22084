"""The paper's formulas as pure functions: tensors and numbers in, tensors and numbers out.

Shape letters: E experts, B blocks, T tokens of a block, D documents, R resamples.
"""
