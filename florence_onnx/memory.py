"""Placeholder until the branch memory is merged."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ONNX Runtime says that a device's memory is full."""
    return "Failed to allocate memory" in str(error) or "out of memory" in str(error)
