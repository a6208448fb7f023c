"""Arithmetic of sizes. Triton has the same, made for kernels too and many times as slow here."""


def cdiv(length: int, step: int) -> int:
    """How many steps reach a length."""
    return -(-length // step)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is no less; 0 for 0."""
    return 1 << (number - 1).bit_length() if number > 0 else 0
