"""Memory for temporaries that is used again and again: fresh memory costs a page fault for every 4 KB, and is cold."""

import math

from torch import Tensor


class Scratch:
    """Buffers by name, in the dtype of an example, that grow to the largest size asked for."""

    def __init__(self, example: Tensor) -> None:
        self.example = example
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape; what stood there under this name is lost."""
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = self.example.new_empty(size)
        return buffer[:size].view(shape)
