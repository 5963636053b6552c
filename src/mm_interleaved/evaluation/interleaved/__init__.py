"""Benchmarks of interleaved generation: their questions as documents, our answers as the files they judge.

One file a benchmark, with two functions: `read` (its published file → documents with a hole) and `write`
(answers → what its own evaluator takes). No data is shipped; formats are those of the published
repositories.
"""
