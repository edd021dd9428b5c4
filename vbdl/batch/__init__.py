"""Batch inference reads the rows of files, tables and data sets and writes files of predictions."""
