"""`python -m tests.proof`: no acknowledged operation is lost, none is applied twice."""

import argparse
import random
import resource
import sys
import time
import traceback
from collections.abc import Sequence

from tests.proof import fuzz, model, patroni, power, report, soak
from tests.proof.controls import CONTROLS
from tests.proof.faults import FAULTS, thousand_connections
from tests.proof.section import Account, Scale, Section

SECTIONS: dict[str, Section] = {
    "model": model.run,
    "schemathesis": fuzz.schemathesis,
    "fuzz": fuzz.run,
    **FAULTS,
    "thousand-connections": thousand_connections,
    "power-loss": power.power_loss,
    "patroni": patroni.patroni,
    **CONTROLS,
    "control-not-flushed": power.control_not_flushed,
    "soak": soak.run,
}


def main(arguments: Sequence[str]) -> int:
    """Run sections and return the exit code: 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.proof", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few of everything, and no file is written")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    asked = parser.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a thousand connections, at both ends

    scale = Scale(asked.seed, asked.short)
    where = {} if scale.short else report.environment()
    print(f"seed {scale.seed}")
    print(report.HEAD, flush=True)
    findings = 0
    for name in asked.only or SECTIONS:
        began = time.monotonic()
        account = run(SECTIONS[name], scale)
        seconds = time.monotonic() - began
        print(report.told(name, account, seconds), flush=True)
        findings += len(account.findings)
        if not scale.short:
            report.record(name, scale.seed, account, seconds, where)
    print(f"{findings} findings")
    return min(findings, 1)


def run(section: Section, scale: Scale) -> Account:
    """Run a section; one that breaks off has found something."""
    try:
        return section(scale)
    except Exception as error:
        traceback.print_exc()
        return Account(findings=[f"the section broke off: {type(error).__name__}: {error}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
