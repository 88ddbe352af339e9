"""What can be measured of a model once, before any compression."""
