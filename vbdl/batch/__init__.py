"""Batch inference: rows of files, tables and data sets in, files of predictions out."""
