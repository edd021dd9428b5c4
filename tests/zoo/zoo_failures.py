"""The cells of the zoo that fail today, and why. The test of a mended cell fails until its line here is removed."""

FAILURES: dict[tuple[str, str], str] = {}
