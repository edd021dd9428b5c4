"""Batch inference: it reads rows of files, tables and data sets, and writes files of predictions."""
