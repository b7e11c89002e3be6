"""``python -m ddpm_fast``: the command line."""

from ddpm_fast.cli import main

if __name__ == "__main__":
    main()
