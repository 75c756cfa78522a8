"""What `update-watch run` tells the processes of the command, through one environment variable."""

from __future__ import annotations

import dataclasses
import json
import os

VARIABLE = "UPDATE_WATCH_RUN"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of a run."""

    journal: str
    """Absolute path of the journal; further processes that train by themselves write beside it."""

    window: int = 128
    """Optimizer steps per report."""

    wandb: bool = False
    """Log to the W&B run that the script has open."""

    claims: str = ""
    """File of the command's own in which its processes note the journals they keep, a line each."""

    def to_variable(self) -> str:
        """For the environment."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_environment(cls) -> Settings:
        """Raises KeyError outside of a run."""
        return cls(**json.loads(os.environ[VARIABLE]))
