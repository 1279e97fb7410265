"""Arrays and dicts of arrays with the methods of tensors that tools call on the way from processor to model."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import numpy.typing as npt


class Array(np.ndarray[Any, np.dtype[Any]]):
    """A numpy array on which moving between devices and changing the precision does nothing.

    The runtime casts to what its graphs take, and moves what it must: a tool's `.to("cuda", torch.float16)` is neither needed nor
    harmful.
    """

    def to(self, *_: Any, **__: Any) -> Array:
        """The array itself, whatever device or dtype is named."""
        return self

    cuda = cpu = half = float = bfloat16 = detach = contiguous = to

    def numpy(self) -> npt.NDArray[Any]:
        """The array without these methods."""
        return self.view(np.ndarray)


def as_array(values: npt.ArrayLike, dtype: npt.DTypeLike) -> Array:
    """Values as an `Array`."""
    return np.asarray(values, dtype=dtype).view(Array)


class BatchFeature(UserDict[str, Array]):
    """What the processor returns: arrays by name, also as attributes."""

    def __getattr__(self, name: str) -> Array:
        if name == "data":  # while it is being unpickled or copied there is none yet
            raise AttributeError(name)
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(f"the processor gave {', '.join(self.data)}, not {name}") from None

    def to(self, *_: Any, **__: Any) -> BatchFeature:
        """The same arrays: see `Array.to`."""
        return self

    cuda = to
