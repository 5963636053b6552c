"""Corpora in, batches out: sources yield documents, mixing and packing make rows of them."""
