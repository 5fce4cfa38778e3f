"""What a user reads when something goes wrong: one line, whatever it was."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from pnorm_decay.data import DataError
from pnorm_decay.messages import one_line
from pnorm_decay.records import RecordError
from pnorm_decay.training import stopping
from pnorm_decay.training.progress import console, is_first_process
from pnorm_decay.training.run import RunError, reason_of
from pnorm_decay.training.settings import ConfigError

# Their messages say what to do.
USER_ERRORS = (ConfigError, DataError, RecordError, RunError, OSError)
# Hydra spreads a short message over many lines.
CONFIG_ERRORS = (HydraException, OmegaConfBaseException)
FIRST_SPEAKS_SECONDS = 10.0  # for which another process of the run leaves it to the first


def print_error(error: Exception) -> None:
    """Says in one line what went wrong; of what nobody foresaw, the frames are kept in a file.

    Of the processes that do a run together, the first says what all of them found.
    """
    if _is_said_by_the_first():
        return
    if isinstance(error, CONFIG_ERRORS):  # some of them are OSErrors too
        message = " ".join(f"{error} {error.__cause__ or ''}".split())
    elif isinstance(error, USER_ERRORS):
        message = str(error)
    else:
        message = f"{reason_of(error)} (see {keep_frames(error)})"
    console.print("error:", one_line(message), style="red")


def _is_said_by_the_first() -> bool:
    """Whether this process is ended because the first one of its run has ended, with the error."""
    if is_first_process() or stopping.requested():
        return False
    end = time.monotonic() + FIRST_SPEAKS_SECONDS
    while time.monotonic() < end:
        if stopping.requested():  # by torchrun, which ends all when one has ended
            return True
        time.sleep(0.05)
    return False


def keep_frames(error: BaseException) -> Path:
    """Writes where an error came from into a file of the system's temporary folder."""
    trace = "".join(traceback.format_exception(error))
    descriptor, name = tempfile.mkstemp(prefix="pnorm-decay-", suffix=".txt", text=True)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
        file.write(trace)
    return Path(name)
