"""The embedded text-to-image model and the programs around it; installed as `linfusion.demos`."""
