"""Rectified-flow sampling: schedule, guidance, image conditions and the Euler solver.

Sigma runs from 1 (noise) to 0 (data); velocity points from data to noise.
"""
