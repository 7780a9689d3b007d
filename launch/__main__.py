"""`python -m launch`: the jobkit command."""

from launch.cli.main import main

if __name__ == "__main__":
    main()
