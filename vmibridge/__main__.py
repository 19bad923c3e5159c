"""The `vmibridge` command, and `python -m vmibridge`, which is the same."""

import sys


def main() -> int:
    """Run the command of `sys.argv`; returns the exit status."""
    if sys.argv[1:2] == ["health"]:
        # Asked every few seconds, for as long as a container lives: without the command line,
        # which takes several times as long.
        from vmibridge.health.ask import ask_quickly

        status = ask_quickly(sys.argv[2:])
        if status is not None:
            return status
    from vmibridge.cli import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
