"""The main job: three methods against one network, on data that needs no download, as a table, figures and models."""
