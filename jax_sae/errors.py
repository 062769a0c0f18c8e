"""The one exception that means "what was given cannot be used"."""


class BadInput(ValueError):
    """A file, a name or a setting cannot be used as given.

    The message is one line: what was found, what was expected, and what to do. A script prints it without a traceback
    and ends with exit code 2. Anything else that is raised is a defect of this package and keeps its traceback.
    """
