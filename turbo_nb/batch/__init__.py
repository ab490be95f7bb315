"""Many prompts become videos: read, checked, made and recorded, by a run that can be stopped and started again."""

from .manifest import JobRecord, read_manifest
from .notebook import live, run_notebook
from .prompts import Job, read_prompts
from .runner import run
from .summary import Progress, Summary, describe

__all__ = [
    "Job", "JobRecord", "Progress", "Summary", "describe", "live", "read_manifest", "read_prompts", "run",
    "run_notebook",
]  # fmt: skip
