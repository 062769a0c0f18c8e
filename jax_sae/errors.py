"""The two exceptions that a script prints as one line, without a traceback."""


class BadInput(ValueError):
    """A file, a name or a setting cannot be used as given.

    The message is one line: what was found, what was expected, and what to do. A script prints it without a traceback
    and ends with exit code 2. Anything else that is raised is a defect of this package and keeps its traceback.
    """


class RunFailed(RuntimeError):
    """A run that began well cannot go on: the disk is full, or every member has diverged.

    The message is one line, as for `BadInput`; a script prints it and ends with exit code 1. What was saved stays.
    """
