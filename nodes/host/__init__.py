"""The only code that knows the host's insides."""
