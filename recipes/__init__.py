"""Runnable recipes and the command line: `samplewise run NAME`, or `python -m samplewise.recipes.NAME`."""
