"""`btm`, and `python -m btm_cluster`: signals are heard before anything is imported that takes long."""

from btm_cluster.stopping import end_at_signals


def main() -> None:
    """Runs the command line."""
    end_at_signals()
    from btm_cluster.cli import main

    main()


if __name__ == "__main__":
    main()
