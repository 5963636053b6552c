"""Metrics: pure functions of answers and truth, a file a family. None of them sees a model or a document."""
