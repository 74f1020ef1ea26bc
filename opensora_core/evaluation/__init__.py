"""A synthetic world of moving shapes, and plain computer vision that reads clips of it.

The small model is trained on this world, so that any checkpoint, precision or mode of it can be judged by how
many prompts come out right. To judge one clip (64x64, 17 frames):

    from opensora_core.evaluation import Combination, judge

    asked = Combination(shape="circle", colour="red", background="blue", direction="right")
    result = pipe(asked.prompt(), height=64, width=64, num_frames=17, options=SamplingOptions(motion_score=4))
    verdict = judge(result.frames[0], asked, motion_score=4)
    verdict.is_right            # colour, background, shape and direction
    verdict.right["shape"]      # each of the four
    verdict.reading.is_steady   # one object in all frames; verdict.reading.faults says why not
    verdict.sentence()          # "shows a red circle moving right on blue: right"
"""

from .verdict import Verdict, judge
from .vision import Reading, read
from .world import Combination, Scene

__all__ = ["Combination", "Reading", "Scene", "Verdict", "judge", "read"]
