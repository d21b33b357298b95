"""`python -m ema_scale`, for launchers that start modules."""

from ema_scale.cli import main

if __name__ == "__main__":
    main()
