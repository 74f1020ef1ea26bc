"""The errors a person is meant to read.

Every message says what failed, what was given, what is expected and, where there is one, the nearest
valid value. Anything else that is raised is a defect of ours.
"""


class OpenSoraError(ValueError):
    """A request that cannot be met as it was given: a size, a frame count, a scale, an image."""


class CheckpointError(OpenSoraError):
    """A file that cannot be read as the model it was given for: another model, truncated, keys missing."""
