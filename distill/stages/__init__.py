"""The two stages; each is a module whose forward takes a batch and returns losses."""

from .base import Stage
from .end_to_end import EndToEnd
from .transfer import Transfer

STAGES: dict[str, type[Stage]] = {"transfer": Transfer, "end_to_end": EndToEnd}

__all__ = ["STAGES", "EndToEnd", "Stage", "Transfer"]
