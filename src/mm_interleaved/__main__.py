"""`python -m mm_interleaved`."""

from mm_interleaved.cli.main import main

main()
