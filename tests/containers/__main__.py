"""`python -m tests.containers`: the image is built and compose.yaml run; everything is taken down afterwards.

It takes a minute or two, and 127.0.0.1:5433. Without a container engine it says that it was skipped.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.settings import CHECKOUT


def missing() -> str | None:
    """Return what these tests need and this machine has not; None if they can run."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        if not runs(*command):
            return f"`{' '.join(command)}` fails"
    compose = yaml.safe_load((CHECKOUT / "compose.yaml").read_text())
    bases = re.findall(r"^FROM (\S+)", (CHECKOUT / "Dockerfile").read_text(), re.MULTILINE)
    for image in [*bases, compose["services"]["database"]["image"]]:
        if not (runs("docker", "image", "inspect", image) or runs("docker", "pull", "--quiet", image)):
            return f"the image {image} is not here and cannot be pulled"
    return None


def runs(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=600).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def main(arguments: list[str]) -> int:
    """Run the tests with pytest's arguments and return its exit code, or 0 where they cannot run."""
    what = missing()
    if what is not None:
        print(f"SKIPPED: {what}")
        return 0
    return int(pytest.main(["-v", *arguments, str(Path(__file__).with_name("checks.py"))]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
