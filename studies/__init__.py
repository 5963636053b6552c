"""Studies of the shipped model and of its world, beside the library: `python -m studies NAME`."""
