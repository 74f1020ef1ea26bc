"""The command lines and prompts of the guides of Open-Sora 1, as this library's own options: loops, parts of a prompt, settings at its end."""

from dataclasses import replace

from ..choices import SCRIPTS
from ..errors import OpenSoraError
from ..family import Family
from ..run.segments import MOST_SEGMENTS
from ..text.prompt_1x import split_parts, split_settings, text_of_loop
from .options import GenerateOptions
from .output import check_count


def understood(options: GenerateOptions, family: Family) -> GenerateOptions:
    """Options in which `loop`, and what a prompt of a model that knows mask strategies says besides its text, stand in their own places."""
    loops = 1 if options.loop is None else options.loop
    check_count("--loop", loops, most=MOST_SEGMENTS)
    if options.loop is not None and options.extend is not None:
        raise OpenSoraError("--loop N is --extend N-1; give one of them.")
    if options.condition_frame_length is not None and loops < 2:
        raise OpenSoraError("--condition-frame-length goes with --loop N, the clips that follow one another; add that.")
    if options.parity == SCRIPTS and loops < 2:
        raise OpenSoraError("--parity scripts goes with --loop N, the clips that follow one another; add that.")
    piece, given = family.grid.piece or 1, options.condition_frame_length
    if given is not None and (given < 1 or given % piece):
        raise OpenSoraError(f"--condition-frame-length {given} does not fit this model; use {piece}{' or a multiple of it' * (piece > 1)}.")
    parts = [(0, options.prompt)]
    if family.sampling.place is not None and options.prompt is not None:
        prompt, settings = split_settings(options.prompt)
        parts = split_parts(prompt.strip())
        options = replace(options, **{name: value for name, value in settings.items() if value})
    options = _of_cond_type(replace(options, prompt=parts[0][1]))
    if loops == 1:
        return options
    return replace(
        options,
        extend=loops - 1,
        extend_prompt=options.extend_prompt or [text_of_loop(parts, loop) for loop in range(1, loops)],
        extend_context=options.extend_context if given is None else family.grid.pixel_frames(given),
    )


def _of_cond_type(options: GenerateOptions) -> GenerateOptions:
    """Options in which references of a condition type, as the guides of 1.3 list them, are the first and the last frame, or the clip."""
    if not options.reference_path or options.cond_type in (None, "t2v") or options.mask_strategy or options.ref or options.ref_end:
        return options
    paths = [path.strip() for path in options.reference_path.split(";")]
    most = 2 if options.cond_type == "i2v_loop" else 1
    if len(paths) > most:
        raise OpenSoraError(
            f"--cond-type {options.cond_type} takes {most} reference{'s' * (most > 1)}, and --reference-path lists {len(paths)}; leave out the others."
        )
    return replace(options, ref=paths[0], ref_end=(*paths, None)[1], reference_path=None)
