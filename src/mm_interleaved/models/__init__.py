"""Small neural parts and the one file that joins them."""
