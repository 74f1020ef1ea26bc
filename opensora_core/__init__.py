"""Open-Sora text- and image-to-video models, independent of any host.

Importing this package loads nothing heavy; the public names are resolved on first use.
"""

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DecodeOutOfMemory",
    "NotNumbers",
    "OpenSoraError",
    "OpenSoraPipeline",
    "OutOfMemory",
    "SamplingOptions",
    "__version__",
    "open_vae",
    "save_video",
]


def __getattr__(name: str):
    # PEP 562: torch is imported only when the pipeline is asked for, never by a bare import.
    if name in ("OpenSoraError", "CheckpointError", "DecodeOutOfMemory", "NotNumbers", "OutOfMemory"):
        from . import errors

        return getattr(errors, name)
    if name == "OpenSoraPipeline":
        from .pipeline import OpenSoraPipeline

        return OpenSoraPipeline
    if name == "SamplingOptions":
        from .run.request import SamplingOptions

        return SamplingOptions
    if name == "open_vae":
        from .run.parts import open_vae

        return open_vae
    if name == "save_video":
        from .media.video import save_video

        return save_video
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
