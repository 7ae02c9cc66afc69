"""`python -m fedgrpc` is the command `fedgrpc`."""

from fedgrpc.cli.main import main

if __name__ == "__main__":
    main()
