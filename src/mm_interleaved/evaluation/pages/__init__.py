"""The pages of evaluations: one of a single evaluation, one that compares several."""
