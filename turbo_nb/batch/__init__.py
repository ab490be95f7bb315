"""Many prompts: read, planned, made, recorded."""

from .manifest import read_manifest
from .notebook import run_notebook
from .prompts import Job, read_prompts
from .runner import run
from .summary import Summary, describe

__all__ = ["Job", "Summary", "describe", "read_manifest", "read_prompts", "run", "run_notebook"]
