"""Large models as judges of interleaved answers: none, one on this machine, or one behind a URL."""
