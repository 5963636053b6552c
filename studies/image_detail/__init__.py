"""Trials of some minutes: by what a small U-Net learns to look at earlier images."""
