"""python -m hub_mpq, the same as hub-mpq."""

from .cli import main

if __name__ == "__main__":
    main()
