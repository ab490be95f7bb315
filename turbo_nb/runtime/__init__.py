"""Where the parts of a model are while it runs, and how long its stages take."""
