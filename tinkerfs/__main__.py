"""Run the command line as `python -m tinkerfs`."""

from tinkerfs.cli.main import main

if __name__ == "__main__":
    main()
