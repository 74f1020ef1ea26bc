"""How a video is made of a checked request: the stages text, condition, sampling and decode, and the two walks through them.

`clip.py` makes a clip of a request, and goes on from a finished one. `result.py` is what comes out, and who is told on the way.
"""
