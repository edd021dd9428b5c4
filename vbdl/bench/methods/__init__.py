"""Methods: one file each, registered by name."""
