"""The command line: ``python -m moda_kernels COMMAND``. Each command is a module with `add_arguments` and `run`."""

import argparse
import sys
from collections.abc import Sequence

from moda_kernels import __version__
from moda_kernels.commands import bench, demo, doctor, verify

COMMANDS = {
    "bench": (bench, "side by side with what you might use instead: table, result file, picture"),
    "demo": (demo, "what alignment is good for: small models on scanned digits, about a minute on a CPU"),
    "doctor": (doctor, "what is installed, what runs here, and why the rest does not"),
    "verify": (verify, "is attention right on this machine, feature by feature? Within a minute"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m moda_kernels", description="MODA attention for PyTorch.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made: dict[str, argparse.ArgumentParser] = {}
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
        made[name] = command
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = made[parsed.command]
        known = (action.option_strings[-1] for action in command._actions if action.option_strings)
        command.error(f"expected options of {parsed.command} ({', '.join(known)}), got {' '.join(unknown)}")
    return int(parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())
