"""`python -m app` in a process that is forked from one which has imported the service, and nothing of the tests."""

import os
import sys
from pathlib import Path

import app.keys
import app.server.supervisor  # noqa: F401 - imported once, for all
from app.__main__ import main
from app.settings import CHECKOUT


def command(arguments: list[str], environment: dict[str, str], output: Path, errors: Path) -> None:
    """Be `python -m app` with these arguments, whose output goes to files."""
    for descriptor, file, mode in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY), (2, errors, os.O_WRONLY)):
        opened = os.open(file, mode | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(CHECKOUT)
    sys.exit(main(arguments))
