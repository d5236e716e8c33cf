"""`python -m packlight` is the `packlight` command."""

from packlight.cli import main

if __name__ == "__main__":
    main()
