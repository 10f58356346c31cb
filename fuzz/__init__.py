"""Fuzz targets for every parser and every request body; see fuzz/README.md."""
