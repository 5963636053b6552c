"""Typed functions that name every number of a training run; in the package, so that an installed wheel can
run them.
"""
