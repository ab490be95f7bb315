"""The generator's jobs and its widgets."""
