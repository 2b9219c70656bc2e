"""Process group, collectives, lockstep over ranks, signals, watchdog, and the sharding plan."""
