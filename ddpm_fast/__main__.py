"""Command line: `python -m ddpm_fast`."""

from ddpm_fast.cli import main

if __name__ == "__main__":
    main()
