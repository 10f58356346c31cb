"""The report of an adaptation: JSON is the truth, Markdown and HTML are views of it."""
