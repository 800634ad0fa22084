"""`btm quickstart`."""


def quickstart() -> None:
    """Write a small plan here, quickstart.yaml, and text for it that your Python installation has."""
    from btm_cluster.operations.quickstart import PLAN_FILE, write_quickstart

    for line in write_quickstart():
        print(line)
    print(f"next: `btm run {PLAN_FILE}`, which takes about four minutes on two cores")
