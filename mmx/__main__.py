"""`python -m mmx` is the `mmx` command."""

from mmx.cli.main import console

if __name__ == "__main__":
    console()
