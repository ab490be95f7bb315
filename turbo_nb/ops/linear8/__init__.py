"""8-bit linear layers."""
