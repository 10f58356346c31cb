"""Whether a device paints the right picture: measures between pictures."""
