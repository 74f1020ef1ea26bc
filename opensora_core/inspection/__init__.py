"""What a file is, and whether it works: for people."""
