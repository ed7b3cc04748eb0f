"""How a solve ended."""

import enum


class ReturnCode(enum.Enum):
    """The way a solve ended; its value is a sentence about it, also at ``.message``.

    Only ``SUCCESS`` and ``TERMINATED`` are ends that somebody asked for. After the others the
    solution holds the part that is good, and :func:`ctgate.solve` has warned.
    """

    SUCCESS = "The solve reached the end of tspan."
    TERMINATED = "A callback ended the solve."
    MAX_STEPS = "The solve used up max_steps before the end of tspan."
    DT_UNDERFLOW = "The step that the tolerances ask for is below the resolution of time."
    UNSTABLE = "The state or its derivative is no longer finite."
    INTERRUPTED = "The solve was interrupted from the keyboard."

    @property
    def good(self) -> bool:
        """Whether the solve ended as somebody asked."""
        return self in (ReturnCode.SUCCESS, ReturnCode.TERMINATED)

    @property
    def message(self) -> str:
        """One sentence that says what happened."""
        return str(self.value)


class Halt(Exception):
    """Raised inside an integrator to end the solve with a code; never leaves :func:`ctgate.solve`."""

    def __init__(self, code: ReturnCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class SolveError(RuntimeError):
    """A solve failed and ``throw=True`` was asked for.

    ``retcode`` says how; the message names the time, the step, the worst unit, its rate and what to try.
    """

    def __init__(self, message: str, retcode: ReturnCode) -> None:
        super().__init__(message)
        self.retcode = retcode
