"""``python -m fastprefix``: the command."""

from fastprefix.cli import main

if __name__ == "__main__":
    main()
