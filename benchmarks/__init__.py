"""Speed, measured: `python -m benchmarks step|kernels|vae|e2e`, and `table` to show the rows.

`harness` times, checks and writes; the other modules say what is timed and against what it is checked. A row of the CSV
is written only after that configuration's check has passed in the same run. Not part of the installed package.
"""
