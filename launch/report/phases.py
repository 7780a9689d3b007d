"""How a phase of a run is called and coloured, in every picture of it."""

from launch.report.timeline import Phase

WORDS = {
    Phase.TRAIN: "training",
    Phase.SAVE: "saving",
    Phase.EMERGENCY: "emergency save",
    Phase.LOST: "lost",
    Phase.STALLED: "stalled",
    Phase.START: "starting",
    Phase.RESTORE: "restoring",
    Phase.COMPILE: "compiling",
    Phase.STOP: "stopping",
    Phase.QUEUE: "in the queue",
    Phase.IDLE: "between attempts",
    Phase.OFF: "ended",
}
"""What a person reads."""

MEANING = {
    Phase.TRAIN: "steps that the run still has",
    Phase.SAVE: "training waited for a save",
    Phase.EMERGENCY: "a notice was served: from the last step to the commit",
    Phase.LOST: "training that an interruption took back",
    Phase.STALLED: "no step for far longer than any before",
    Phase.START: "imports and the program's own preparation",
    Phase.RESTORE: "the checkpoint was read",
    Phase.COMPILE: "until the end of the first step",
    Phase.STOP: "last uploads, processes going",
    Phase.QUEUE: "a scheduler had not started the job yet",
    Phase.IDLE: "backoff, and the launcher starting the next attempt",
    Phase.OFF: "until a person resumed it",
}
"""One clause for a legend."""

# After Okabe and Ito: told apart by the colour-blind too. Warm is bad, cool is overhead, grey waits.
COLORS = {
    Phase.TRAIN: "#009e73",
    Phase.SAVE: "#f0c808",
    Phase.EMERGENCY: "#e69f00",
    Phase.LOST: "#d55e00",
    Phase.STALLED: "#8c2d04",
    Phase.START: "#56b4e9",
    Phase.RESTORE: "#0072b2",
    Phase.COMPILE: "#cc79a7",
    Phase.STOP: "#7a6fa8",
    Phase.QUEUE: "#b4bac2",
    Phase.IDLE: "#8a929c",
    Phase.OFF: "#00000000",
}
"""Colours that stand on white and on black alike."""


def ink_on(phase: Phase) -> str:
    """Return the colour of words on a phase's own: the one of black and white that stands out more."""
    red, green, blue = (int(COLORS[phase][at : at + 2], 16) / 255 for at in (1, 3, 5))
    return "#17202a" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.25 else "#ffffff"


def percent(share: float) -> str:
    """Write a share for a person: '39.5 %', and never '0.0 %' for something that is there."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
