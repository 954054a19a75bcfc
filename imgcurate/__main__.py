"""Run the command line: ``python -m imgcurate``."""

from imgcurate.cli import main

if __name__ == "__main__":
    main()
