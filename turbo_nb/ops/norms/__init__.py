"""Norms, residuals and rotary embedding of a transformer block."""
