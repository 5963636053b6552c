"""What goes in and out: documents, their images, the forms of record that are read, and strict JSON."""
