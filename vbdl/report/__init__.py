"""A benchmark run as one HTML page, and two runs compared. Reads the files of `vbdl bench`, trains nothing."""
