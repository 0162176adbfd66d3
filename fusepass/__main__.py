"""`python -m fusepass`."""

from fusepass.cli import main

if __name__ == "__main__":  # a process that `bench` spawns imports this file too
    main()
