"""Options of serving: requests answered outside of the stages."""
