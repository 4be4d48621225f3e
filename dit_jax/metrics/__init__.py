"""Measures of how well generated pictures follow their captions."""
