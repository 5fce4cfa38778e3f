"""What a user reads when something goes wrong: one line, whatever it was."""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from pnorm_decay.data import DataError
from pnorm_decay.messages import one_line
from pnorm_decay.records import RecordError
from pnorm_decay.training.progress import console
from pnorm_decay.training.run import RunError, reason_of
from pnorm_decay.training.settings import ConfigError

# Their messages say what to do.
USER_ERRORS = (ConfigError, DataError, RecordError, RunError, OSError)
# Hydra spreads a short message over many lines.
CONFIG_ERRORS = (HydraException, OmegaConfBaseException)


def print_error(error: Exception) -> None:
    """Says in one line what went wrong; of what nobody foresaw, the frames are kept in a file."""
    if isinstance(error, CONFIG_ERRORS):  # some of them are OSErrors too
        message = " ".join(f"{error} {error.__cause__ or ''}".split())
    elif isinstance(error, USER_ERRORS):
        message = str(error)
    else:
        message = f"{reason_of(error)} (see {keep_frames(error)})"
    console.print("error:", one_line(message), style="red")


def keep_frames(error: BaseException) -> Path:
    """Writes where an error came from into a file of the system's temporary folder."""
    trace = "".join(traceback.format_exception(error))
    descriptor, name = tempfile.mkstemp(prefix="pnorm-decay-", suffix=".txt", text=True)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
        file.write(trace)
    return Path(name)
