"""The machine: where we are, what hardware and libraries it has, and how much memory is free."""
