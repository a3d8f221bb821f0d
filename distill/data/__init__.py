"""Where training samples come from, how they lie on disk, and in which order they are drawn."""
