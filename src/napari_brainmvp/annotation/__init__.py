"""The annotate, predict, correct loop without any window."""
