"""How the pocket model is made, from nothing: `python -m training`."""
