"""The exceptions that a command prints as one line, without a traceback."""

from typing import Any


class BadInput(ValueError):
    """A file, a name or a setting cannot be used as given.

    The message is one line: what was found, what was expected, and what to do. A command prints it without a traceback
    and ends with exit code 2. Anything else that is raised is a defect of this package and keeps its traceback.
    """


class Contradiction(BadInput):
    """A setting that another one makes meaningless; both were given, or one of them is a default.

    Where the two come from different places, such as a file and the flags over it, the setting may be left out.
    """

    def __init__(self, setting: str, found: str, reason: str, advice: str, *, value: Any, others: tuple[str, ...]):
        """Of one setting, such as `sweep.k`.

        Args:
            setting: its name.
            found: what it is, worded to follow its name.
            reason: what is wrong with that, worded to follow "but".
            advice: what to do.
            value: the one value that is meaningless; where all of a list are, the list.
            others: settings that decide whether it has a meaning.
        """
        super().__init__(f"{setting} {found}, but {reason}; {advice}")
        self.setting, self.value, self.reason, self.others = setting, value, reason, others


class RunFailed(RuntimeError):
    """A run that began well cannot go on: the disk is full, or every member has diverged.

    The message is one line, as for `BadInput`; a command prints it and ends with exit code 1. What was saved stays.
    """


class SourceLost(RunFailed):
    """What a run reads cannot be reached any more, such as a text on the network; the run is saved before it ends."""
