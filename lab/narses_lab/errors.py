"""What can go wrong on the experimenter's side.

LabError
├── OptionError  an option of the command line is wrong (exit code 2)
└── DaemonError  a daemon ended before its time, or fell silent (exit code 1)

Apart from narses.errors because importing `narses` imports PyTorch: two seconds during which no daemon would start.
"""

from __future__ import annotations


class LabError(Exception):
    """Base of the tree above; its text is for a person."""


class OptionError(LabError):
    """An option has a value that cannot be used. The text names the option, the value and the remedy."""


class DaemonError(LabError):
    """A daemon that the lab started ended before its time, or fell silent. The text ends with its last lines."""
