"""Where captioned pictures come from: one protocol (`records`), a file per kind of data set, and the words for them
(`catalogue`)."""
