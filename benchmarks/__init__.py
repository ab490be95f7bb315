"""Speed, measured: `python -m benchmarks step|kernels|vae|switch|lora|e2e|startup`, and `table` to show the rows.

`harness` times, checks and writes. Each other module defines one kind of work and its check. A row of the CSV is
written only after the check of its configuration has passed in the same run. The installed package does not contain
this folder.
"""
