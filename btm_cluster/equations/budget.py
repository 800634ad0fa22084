"""The cost of a recipe. Plain arithmetic, no torch."""


def device_hours(tokens: int, tokens_per_device_second: float) -> float:
    """Hours of one device to train on `tokens`."""
    return tokens / tokens_per_device_second / 3600


def stored_bytes(parameters: int, with_optimizer: bool) -> int:
    """Bytes of a model in float32, with Adam's two moments where a branch needs them."""
    return parameters * 4 * (3 if with_optimizer else 1)


def training_flops_per_token(parameters: int, layers: int, width: int, block_tokens: int) -> int:
    """Operations per token, forward and backward: 6 for each parameter, and attention over the block.

    Source: Chowdhery et al., 2022, PaLM, appendix B.
    """
    return 6 * parameters + 12 * layers * width * block_tokens
