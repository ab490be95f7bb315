"""The doctor and the self-test."""
