"""Networks larger than the device's memory: which weights live where (plan.py, integers), and carrying it out (stream.py)."""
