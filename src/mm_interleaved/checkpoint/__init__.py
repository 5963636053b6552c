"""Weights on disk: the released checkpoint's names, conversion, composition, and safe storage."""
