"""What the package raises."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve this call; the message says why."""


class ArgumentError(ValueError, RuntimeError):
    """A bad argument: which one, what was wanted, what came.

    Also a RuntimeError, because that is what torch raises for most of them: code that catches either keeps working.
    """

    def __init__(self, argument: str, wanted: str, got: object):
        super().__init__(f"{argument} must be {wanted}, got {got}")
        self.argument = argument


# What torch's own functions raise for bad arguments.
EXPLAINED = (RuntimeError, TypeError, ValueError, IndexError)
