"""What lies in a model's folder, read without torch: names, headers, values, settings, the card."""
