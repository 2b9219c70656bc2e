"""The engines that run the Ibis expressions of `prepare`."""
