"""What a moment of a run was spent on, and how that is called and coloured in every picture of it."""

import enum
from typing import Self


class RunPhase(enum.StrEnum):
    """What a moment of a run was spent on: its name in JSON, what a person reads, its colour, one clause for a legend.

    The colours, after Okabe and Ito, are told apart by the colour-blind too, and stand on white and on black alike.
    Warm is bad, cool is overhead, grey waits.
    """

    words: str
    color: str
    meaning: str

    def __new__(cls, name: str, words: str, color: str, meaning: str) -> Self:
        """Make a member of a row of the table below."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.words, member.color, member.meaning = words, color, meaning
        return member

    TRAIN = "train", "training", "#009e73", "steps that the run still has"
    LOST = "lost", "lost", "#d55e00", "training that an interruption took back"
    STALLED = "stalled", "stalled", "#8c2d04", "no step for far longer than any before"
    SAVE = "save", "saving", "#f0c808", "training waited for a save"
    EMERGENCY = "emergency", "emergency save", "#e69f00", "a notice was served: from the last step to the commit"
    STOP = "stop", "stopping", "#7a6fa8", "last uploads, processes going"
    START = "start", "starting", "#56b4e9", "imports and the program's own preparation"
    RESTORE = "restore", "restoring", "#0072b2", "the checkpoint was read"
    COMPILE = "compile", "compiling", "#cc79a7", "until the end of the first step"
    QUEUE = "queue", "in the queue", "#b4bac2", "a scheduler had not started the job yet"
    IDLE = "idle", "between attempts", "#8a929c", "backoff, and the launcher starting the next attempt"
    OFF = "off", "ended", "#00000000", "until a person resumed it"

    @property
    def waits(self) -> bool:
        """Whether no attempt runs, and the run goes on by itself."""
        return self in (RunPhase.QUEUE, RunPhase.IDLE)

    @property
    def ink(self) -> str:
        """The colour of words on its own: the one of black and white that stands out more."""
        red, green, blue = (int(self.color[at : at + 2], 16) / 255 for at in (1, 3, 5))
        return "#17202a" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.25 else "#ffffff"


def percent(share: float) -> str:
    """Write a share for a person: '39.5 %', and never '0.0 %' for something that is there."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
