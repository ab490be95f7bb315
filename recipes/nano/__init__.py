"""How the embedded model `nano` is made, from nothing, in stages (see README.md)."""
