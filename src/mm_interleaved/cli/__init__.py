"""The command `mm-interleaved`: ordinary typed functions whose docstrings are their help."""
