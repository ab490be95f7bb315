"""Train the embedded model `nano` from random weights, in stages (see README.md)."""
