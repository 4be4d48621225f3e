"""Captioned pictures on their way into training: where they are, how they are cut, in which order they come, and what
is kept of them once they are encoded.

Everything here is numpy and Pillow and never touches a device; a tokenizer reaches it as a function.
"""
