"""The two kinds of failure a person sees, each as one sentence.

`UsageError`: what was asked for cannot be (exit code 2). `BadFileError`: a file is not what it should be
(exit code 1, like any OSError). Everything else is a bug and keeps its traceback.
"""


class UsageError(ValueError):
    """A request that cannot be met: says what was wrong, the value, what is allowed, what to do."""


class BadFileError(OSError):
    """A file that exists but is truncated, corrupt or of another kind: names the file and the fault."""
