"""The shipped model's recipe: its stages, what supervises them, and their numbers."""
