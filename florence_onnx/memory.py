"""Placeholder."""

OUT_OF_MEMORY = (
    "Failed to allocate memory for requested buffer",
    "is smaller than requested bytes",
    "out of memory",
    "CUDA failure 2:",
    "_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ONNX Runtime says that a device's memory is full."""
    return any(said in str(error) for said in OUT_OF_MEMORY)
