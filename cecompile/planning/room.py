"""The room of a run: the memory that a predicted need may fill."""

import torch

from cecompile import device as device_memory
from cecompile.planning.memory import UNIFIED_RESERVE, USABLE
from cecompile.planning.options import RunOptions
from cecompile.ranks import Ranks


class Room:
    """The memory that a run may fill on one device.

    Args:
        device: the device that runs.
        options: of the run. A target device has its own room.
        ranks: the processes that must come to the same room, each with its own memory.
        sharers: the number of ranks that share the device.

    Attributes:
        limit: bytes that the run may take, once known.
        where: the device's name in messages.
    """

    def __init__(self, device: torch.device, options: RunOptions, ranks: Ranks, sharers: int) -> None:
        self.limit = options.memory_limit
        self.where = device if options.target_device is None else options.target_device.name
        self._device, self._options = device, options
        self._ranks, self._sharers = ranks, sharers
        self._baseline_bytes: int | None = None  # in use before anything is loaded, where that counts
        self._unified_bytes: int | None = None  # of memory that the GPU shares with the host, less the reserve

    def count_as_loaded(self, size: int) -> None:
        """Counts `size` bytes of weights, which are on the device already, as needed and as available."""
        self._baseline_bytes = 0
        if self._options.memory_limit is None:
            self.limit = self._available() + (size if self._device.type == "cpu" else 0)

    def bytes(self) -> int:
        """Bytes that a prediction may fill, the same on all ranks."""
        if self._options.target_device is not None:
            return self._options.target_device.room
        if self._baseline_bytes is None:  # before anything is loaded: weights loaded later are part of the prediction
            held = device_memory.used_already(self._device) if self._options.memory_limit is not None else 0
            self._baseline_bytes = -self._ranks.all_reduce_min(-held)
        if self.limit is None:
            self.limit = self._ranks.all_reduce_min(self._available() // self._sharers)
        if not device_memory.is_integrated(self._device):
            return int(self.limit * USABLE[self._device.type]) - self._baseline_bytes
        if self._options.memory_limit is None:
            return self.limit
        if self._unified_bytes is None:
            self._unified_bytes = self._ranks.all_reduce_min(self._available() // self._sharers)
        return min(self._unified_bytes, int(self.limit * USABLE["cuda"]))

    def _available(self) -> int:
        """Bytes that torch may take now; torch's share of them where others take of the same memory."""
        if device_memory.is_the_hosts(self._device):  # elsewhere `available` counts in what torch holds
            device_memory.give_back(self._device)
        reserve = UNIFIED_RESERVE if device_memory.is_integrated(self._device) else 0
        return device_memory.available(self._device) - reserve
