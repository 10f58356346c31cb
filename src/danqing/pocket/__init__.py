"""The pocket model: a small FLUX.1 that comes with the package."""
