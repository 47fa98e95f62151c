"""`python -m lrc`, and `torchrun -m lrc`."""

from lrc.cli import main

if __name__ == "__main__":
    main()
