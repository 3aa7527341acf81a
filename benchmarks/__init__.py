"""Side-by-side comparison with other libraries (``python -m benchmarks.compare``) and asv suites.

`shapes` holds the workloads; README.md says how to run everything and how to read the results.
"""
