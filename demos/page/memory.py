"""The most memory that a piece of work took."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """From its making on: of the GPU what PyTorch allocated, else of the whole process what Linux counts (VmHWM)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                RESET.write_text("5")
            except OSError:  # not Linux, or not allowed
                self.device = torch.device("meta")

    def mib(self) -> float | None:
        """In MiB; None where nobody counts."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if self.device.type == "meta":
            return None
        return int(STATUS.read_text().partition("VmHWM:")[2].split()[0]) / 1024
