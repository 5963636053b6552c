"""Every corpus format that is read, one file each; a source yields documents and knows nothing of tokens."""
