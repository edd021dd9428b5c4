"""Reports of benchmark runs: a run as an HTML page, and two runs compared. Reads the files of `vbdl bench`."""
