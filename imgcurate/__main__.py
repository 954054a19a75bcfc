"""Run the command line: ``imgcurate``, ``python -m imgcurate``."""

import sys


def main() -> None:
    """Run the command line; stopped while it is being loaded, end as a command of the shell does."""
    try:
        from imgcurate.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
