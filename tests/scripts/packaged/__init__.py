"""A user's package with a training module in it: `python -m packaged.train`."""
