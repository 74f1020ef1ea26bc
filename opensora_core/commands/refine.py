"""`--refine-prompt`: prompts made long descriptions by a text model of transformers, from a folder, with no network."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import OpenSoraError
from ..pipeline import OpenSoraPipeline
from ..readers import kind_of
from ..text.prompt import MOTION_SCORE
from ..text.refine import IMAGE, TEXT, answered, asked
from .frames import PATHS
from .jobs import Job
from .options import GenerateOptions
from .output import say

_MOST_TOKENS = 1024  # of an answer, thoughts included
_SHOWN = 300  # characters of what transformers says


def check(options: GenerateOptions) -> None:
    """Raise an OpenSoraError for options that do not go together, or a folder that holds no text model."""
    if options.refine_model is None and not options.refine_prompt:
        return
    if not options.refine_prompt:
        raise OpenSoraError("--refine-model is what --refine-prompt asks; add --refine-prompt.")
    if options.refine_model is None:
        raise OpenSoraError("--refine-prompt asks a text model of yours: add --refine-model DIR, a causal model of transformers.")
    if options.decode is not None:
        raise OpenSoraError("--refine-prompt needs a prompt; leave it out beside --decode, which has none.")
    folder = Path(options.refine_model).expanduser()
    for name in ("config.json", "*.safetensors", "tokenizer*"):
        if kind_of(folder) != "a folder" or next(folder.glob(name), None) is None:
            example = "give one, such as `hf download Qwen/Qwen3-4B-Instruct-2507 --local-dir DIR` makes."
            raise OpenSoraError(f"{options.refine_model} is no folder of a causal model of transformers (no {name} in it); {example}")


def refined_jobs(jobs: Sequence[Job], options: GenerateOptions, pipe: OpenSoraPipeline) -> list[Job]:
    """The same videos with descriptions in place of their prompts, those of drawn pictures and of segments too where they are the same;
    and with the motion scores that are proposed, where the model is told one and nobody said another."""
    given = [any(job.arguments.get(name) is not None for name in (*PATHS, "references")) for job in jobs]
    asked_of = [(job.options.prompt, IMAGE if has_given else TEXT) for job, has_given in zip(jobs, given, strict=True)]
    answers = _answers(set(asked_of), options.refine_model, pipe.device)
    has_score = pipe.files.family.text.usual.motion_score == MOTION_SCORE
    made = []
    for job, (request, kind) in zip(jobs, asked_of, strict=True):
        picture, told, (text, score) = job.picture, job.arguments["options"], answers[request, kind]
        proposed = {"motion_score": score} if has_score and told.motion_score is None else {}
        if picture is not None and picture.prompt == request:
            picture = replace(picture, prompt=text)
        say(f"{job.name}: {text} (motion score {score})" if has_score else f"{job.name}: {text}")
        longer = job.longer and job.longer.with_prompt(request, text)
        said, arguments = replace(job.options, prompt=text, **proposed), job.arguments | {"options": replace(told, **proposed)}
        made.append(replace(job, options=said, arguments=arguments, picture=picture, longer=longer, request=request))
    return made


def _answers(prompts: set[tuple[str, str]], folder: str, device) -> dict[tuple[str, str], tuple[str, int]]:
    """{(prompt, kind): (description, motion score)}. The text model is read once, and gone when all are written."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(folder).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        how = {"local_files_only": True, "use_safetensors": True, "dtype": "auto", "output_loading_info": True}
        model, about = AutoModelForCausalLM.from_pretrained(path, **how)
        if about["missing_keys"]:  # which transformers fills with noise
            raise ValueError(f"its files lack {len(about['missing_keys'])} tensors, the first is {min(about['missing_keys'])}")
        model = model.to(device)
    except Exception as error:  # transformers documents no exception types; each of them means the same to a person
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:_SHOWN]
        raise OpenSoraError(f"Give --refine-model another folder. {folder} cannot be read as a causal model: {why}") from error
    found = {}
    with torch.inference_mode():
        for prompt, kind in sorted(prompts):
            question = asked(prompt, kind)
            if tokenizer.chat_template:
                chat = [{"role": "user", "content": question}]
                question = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
            ids = tokenizer(question, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).input_ids.to(device)
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_MOST_TOKENS, do_sample=False)
            found[prompt, kind] = answered(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True), prompt)
    return found
