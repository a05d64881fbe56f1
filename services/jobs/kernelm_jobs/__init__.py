"""The job table: see README.md for the reading order."""
