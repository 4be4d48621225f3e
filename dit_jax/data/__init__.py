"""Captioned pictures on their way into training: where they are, how they are cut, in which order they come, and what
is kept of them once they are encoded.

Nothing here touches a device, and all but a few kinds of source need numpy and Pillow alone; a tokenizer reaches it as
a function.
"""
