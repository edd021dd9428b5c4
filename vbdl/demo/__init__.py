"""The demo compares three methods with a single network on data that needs no download: tables, figures and models."""
