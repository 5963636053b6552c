"""The interleaved loop: a document in, events out, a longer document at the end."""
