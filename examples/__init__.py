"""What can be run: see README.md."""
