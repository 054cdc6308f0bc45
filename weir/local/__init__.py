"""Local mode: the whole product on one machine, started by `weir run`."""
