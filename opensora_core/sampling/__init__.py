"""Sampling: process, schedule, guidance, given frames, solvers, and the one loop over them (run.py). A network is a callable here."""
