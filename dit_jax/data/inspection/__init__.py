"""What a person wants to know of a data set, or of a cache, before a night is spent on it."""
