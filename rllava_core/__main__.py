"""`python -m rllava_core`: the command `rllava`, for launchers that start modules."""

from rllava_core.cli import main

if __name__ == "__main__":
    main()
