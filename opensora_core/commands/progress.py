"""Progress bars on standard error: one for each stage of a run, and one over a whole batch."""

import logging
import os
import sys
from contextlib import AbstractContextManager

from tqdm import tqdm

from .output import say

_TITLES = {"text": "text", "picture": "flux", "condition": "pictures", "sampling": "sampling", "decode": "decode"}
_UNITS = {"text": "prompt", "picture": "step", "condition": "picture", "sampling": "step", "decode": "tile"}


class Bar(tqdm):
    """tqdm's bar on standard error; one whose making was interrupted is given up without a word of its own."""

    def __init__(self, *items, **settings):
        if os.environ.get("LOCAL_RANK", "0") != "0":  # of several processes on a machine, one shows the progress of the whole
            settings["disable"] = True
        super().__init__(*items, file=sys.stderr, dynamic_ncols=True, **settings)

    def reach(self, done: int, total: int) -> None:
        """Show that so many of so many are done."""
        self.total = total
        self.update(done - self.n)

    def __del__(self):
        if hasattr(self, "pos"):
            super().__del__()


class Bars(AbstractContextManager):
    """Bars for the pipeline's `progress` and `callback`; use as a context, so that an interrupt leaves no half line.

    title: a line to show first, once the run has begun; a request that is refused shows none.
    is_below: there is a bar above these, of a whole batch; they leave no line.
    """

    def __init__(self, title: str, is_below: bool = False):
        self._title = title
        self._place = {"position": 1, "leave": False} if is_below else {}
        self._bar: Bar | None = None
        self._stage = ""

    def progress(self, stage: str, done: int, total: int) -> None:
        """The pipeline's `progress`."""
        if self._bar is None or stage != self._stage:
            self.__exit__()
            if not self._stage:
                say(self._title)
            self._stage = stage
            self._bar = Bar(total=total, desc=_TITLES[stage], unit=_UNITS[stage], **self._place)
        self._bar.reach(done, total)
        if done == total:
            self.__exit__()

    def step(self, step: int, num_steps: int, forwards_done: int, forwards_saved: int, latents) -> None:
        """The pipeline's `callback`."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{forwards_done} forwards, {forwards_saved} saved", refresh=False)

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Screen(logging.Handler):
    """What a person sees of several videos; use as a context.

    With a number of them there is one bar over all; beneath it are those of the video at work, and the library's warnings are whole lines
    above, each with a name.

    num_videos: of a whole batch; None for no such bar. num_done: of these, those that were finished before.
    at_work: the name that goes before a warning; "" for none.
    """

    def __init__(self, num_videos: int | None = None, num_done: int = 0):
        super().__init__(logging.WARNING)
        self.at_work = ""
        self._library = logging.getLogger(__package__.rpartition(".")[0])
        self._is_batch, self._num_failed = num_videos is not None, 0
        is_shown = self._is_batch and num_done < num_videos
        self._bar = Bar(total=num_videos, initial=num_done, desc="batch", unit="video", disable=not is_shown)

    def __enter__(self) -> "Screen":
        if self._is_batch:
            self._library.addHandler(self)
        return self

    def __exit__(self, *exception) -> None:
        self._library.removeHandler(self)
        self._bar.close()

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{self.at_work}: {record.getMessage()}" if self.at_work else record.getMessage())

    def stages(self, title: str) -> Bars:
        """Bars for one video, or for what several need."""
        return Bars(title, is_below=self._is_batch)

    def finished(self, path: str) -> None:
        """Count a finished video; its path goes to standard output."""
        tqdm.write(path, file=sys.stdout)
        sys.stdout.flush()
        self._bar.update()

    def made_by_others(self, number: int) -> None:
        """Count videos of the batch that other processes finished."""
        self._bar.update(number)

    def failed(self, line: str) -> None:
        """Count a video that is given up, and say why."""
        say(line)
        self._num_failed += 1
        self._bar.set_postfix_str(f"{self._num_failed} failed", refresh=False)
        self._bar.update()
