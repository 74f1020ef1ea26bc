"""The commands of `python -m opensora_core`, one module each; cli.py holds their arguments."""
