"""Process group, collectives, ranks in step, signals, watchdog, and the sharding plan."""
