"""How fast, how much memory, how exact: our fast paths beside the textbook, in one run.

`python -m benchmarks NAME [--quick]` runs one part, see `__main__.py`; docs/performance_results.md reads
the results.
"""
